# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-patch`` command: one module for each thing it does."""
