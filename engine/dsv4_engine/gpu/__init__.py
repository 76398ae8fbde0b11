"""The model on NVIDIA GPUs through the Triton kernels of dsv4_kernels.triton.

state.py: one sequence's state in flat buffers and shared slabs.  weights.py: published packed tensors, straight to the
device or made at random there.  layer.py: what is launched for one layer.  stage.py: consecutive layers on one device.
decode.py: one token as a replayed graph.  model.py: the whole, with the interface of dsv4_engine.model.Model.
Nothing outside imports this package before a GPU was chosen: it needs triton.
"""
