"""Ask a teacher over HTTP what it would say next: `python jobs/score.py URL TEACHER PROMPT RESPONSE`.

The token is read from RAYFUSE_HTTP_TOKEN; the server is `rayfuse serve-teachers CONFIG`, or a run with serving.http.
"""

import json
import os
import sys
from urllib.request import Request, urlopen

url, teacher, prompt, response = sys.argv[1:]
body = {"teacher": teacher, "samples": [{"prompt": prompt, "response": response}]}
headers = {"Authorization": f"Bearer {os.environ['RAYFUSE_HTTP_TOKEN']}", "Content-Type": "application/json"}
answer = json.load(urlopen(Request(f"{url}/score", json.dumps(body).encode(), headers)))
for logps, ids in zip(answer["signals"][0]["logps"], answer["signals"][0]["ids"], strict=True):
    print(ids[0], f"{logps[0]:.3f}")
