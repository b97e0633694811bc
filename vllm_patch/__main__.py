# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_patch``, the same as ``vllm-patch``."""

import sys

from vllm_patch.cli.main import main

sys.exit(main())
