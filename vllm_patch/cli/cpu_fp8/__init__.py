# SPDX-License-Identifier: Apache-2.0
"""FP8 operators for vLLM's CPU engine on CPUs where vLLM itself has none.

Only a process that calls ``operators.install`` gets them, and says so: those of
``engine_run``, of ``check`` and of the tests. Nothing that serves does.
"""
