"""`python tests/cuda_on_host --op NAME -k TEXT`: the tests of the registry with CUDA kernels on the
CPU, as `make test` runs them.
"""

import sys
from pathlib import Path


def main() -> int:
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests.parent)]
    import cuda_on_host

    done = cuda_on_host.run_tests(*sys.argv[1:])
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
