"""Counts what a training step executes on a GPU, without one (`tools/bench/count_gpu_step.py`).

Read `recording.py` first: what is counted. `fake_cuda.py` executes operations on tensors that claim to be on CUDA, and
`torch_on_cuda.py` takes the kernels that a CUDA build takes. `operation_costs.py` and `roofline.py` hold the formulas.
`step.py` counts the forward and backward pass of a task, `engine_step.py` what DeepSpeed adds, `report.py` prints.
A kernel of the project's own is counted as `custom_kernels.py` explains.
"""
