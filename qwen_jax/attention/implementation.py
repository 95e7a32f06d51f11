"""An attention function with a name, and the kernels for a cache that go with it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from qwen_jax.attention.reference import Attend, Decode, PagedAttend, WritePages
from qwen_jax.kernels.flash import CacheLeaf, KeysOrValues, PoolLeaf, Scale
from qwen_jax.kernels.mask import Mask

FEW = 16  # the most query tokens that a decode kernel takes
CACHED = ("decode", "paged decode", "paged prefill", "write")  # tasks with kernels of their own


@dataclasses.dataclass(frozen=True)
class Implementation:
    """An attention function with a name, and the kernels for a cache that go with it.

    name: its name in `IMPLEMENTATIONS`, or a description.
    attend: the attention function.
    decode: the kernel for a few queries against a cache. Without one, attention to the cache and to
        the new tokens is computed apart, and merged.
    takes_known: whether the attention function has the option `known` (`flash.attend_through`),
        with which ring attention saves it work in the backward pass.
    paged_decode, paged_prefill: the kernels for a few and for many queries against a cache in
        pages. Without one, pages are gathered, and attended to by `attend`.
    write: the kernel that writes into pages. Without one, XLA does.

    Equal implementations have equal hashes, by which `jax.jit` finds compiled programs.
    """

    name: str
    attend: Attend
    decode: Decode | None = None
    takes_known: bool = False
    paged_decode: PagedAttend | None = None
    paged_prefill: PagedAttend | None = None
    write: WritePages | None = None

    @staticmethod
    def of(attend: Attend) -> "Implementation":
        """Return an attention function as an implementation; a plain one has no decode kernel."""
        return attend if isinstance(attend, Implementation) else Implementation("", attend)

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: KeysOrValues,
        v: KeysOrValues,
        mask: Mask,
        scale: Scale,
        return_lse: bool = False,
        **local_options: Any,
    ) -> Any:
        """Attend. Arguments and results are those of `attention.xla`."""
        return self.attend(q, k, v, mask, scale, return_lse, **local_options)

    def decode_kernel(self, q: Float[Array, "B T N H"], *, keys: CacheLeaf) -> Decode | None:
        """Return the kernel that attends from these queries to a cache, or None.

        q: the queries. The result is None for more than `FEW` tokens T.
        keys: the cached keys.
        """
        return self.decode if q.shape[1] <= FEW else None

    def paged_kernel(self, q: Float[Array, "B T N H"], *, kv: PoolLeaf) -> PagedAttend | None:
        """Return the kernel that attends from these queries to pages, or None."""
        return self.paged_decode if q.shape[1] <= FEW else self.paged_prefill

    def write_kernel(self, q: Float[Array, "B T N H"], *, kv: PoolLeaf) -> WritePages | None:
        """Return the kernel that writes into pages in a pass of these queries, or None."""
        return self.write

    def of_task(self, task: str) -> Callable[..., Any] | None:
        """Return the function for a task of `workloads.Case`, or None."""
        return getattr(self, task.replace(" ", "_"), None) if task in CACHED else self.attend
