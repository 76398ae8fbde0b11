"""What Gluon kernels wait by: the barrier of a warp group, and those of stages that one warp fills and others read."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name before Triton 3.7


@gluon.jit
def barriers(STAGES: gl.constexpr, READERS: gl.constexpr):
    """Per stage a barrier for what has arrived, and one for what READERS have read."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)
    return full, empty
