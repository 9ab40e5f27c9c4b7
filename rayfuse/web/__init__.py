"""The teachers over HTTP, beside the run that uses them.

gate      who may ask, how much, and how many at a time
app       the routes and their OpenAPI description
server    the server, in a thread of the process that started it

Serve's own HTTP proxy is not used: its settings are fixed when Serve starts, which a run does without HTTP, and it
would listen on every node. This server holds all public limits in one place and ends with its process.
"""
