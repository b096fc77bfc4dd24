"""Does this machine's GPU give what the CPU gives, and how fast: what `tools/gpu_check.py` runs."""
