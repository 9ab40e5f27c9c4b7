"""A run as a Ray job:

ray job submit --working-dir . -- python jobs/fuse.py CONFIG [a.b=value ...] [--resume]
"""

import argparse
from pathlib import Path

from rayfuse.cli import errors_shown, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", help="a.b=value ...: changes to the file")
    parser.add_argument("--resume", action="store_true", help="go on with what the output folder holds")
    arguments = parser.parse_intermixed_args()
    with errors_shown():
        run(arguments.config, arguments.overrides, resume=arguments.resume)
