"""The Triton kernels of a GPU: one op a file, named as in `backend.Kernels`. Also run by Triton's interpreter on a CPU, in tests."""
