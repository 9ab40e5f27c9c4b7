"""Models as files and as modules: loading, output layers, shards and merges."""
