"""These tests run Triton's kernels on the CPU in its interpreter, which must be asked for before Triton is imported: `test_triton` does."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
