"""One function per operation; `kernel=` picks among its twins: plain PyTorch, Triton, another library's.

The Triton twin of OP lives in OP_triton.py and is imported when it is chosen: Triton does not exist on every system.

What the names in the Triton files mean stands in README.md beside this file."""
