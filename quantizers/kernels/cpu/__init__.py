"""Kernels in C++ for CPUs: `library` loads them, `step` runs whole engine steps of the Llama family through them."""
