"""Finding the nearest of many vectors: vectors in, rows and scores out; no text, no encoder.

A flat scan is exact to the last bit. Matrix products round differently with the size of a batch, so what they find is
taken as candidates only: their scores are computed anew, each on its own, in double precision, and more candidates
are asked for until the largest possible rounding error cannot hide a better one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agentgym_ig.indexes.encoders import Vectors
from agentgym_ig.records import write_json

if TYPE_CHECKING:
    import torch

Rows = NDArray[np.int64]
Found = tuple[Rows, Vectors]
"""Rows of the k best, best first, and their scores; all that score the same as the last of them come too."""
SPARE = 8
"""Candidates beyond k, so that asking again is rare."""
WORKING_BYTES = 64 << 20
"""For the scores in hand."""
GPU_BYTES = 1 << 30
"""The same on a GPU, where many small steps cost more than few large ones."""
CACHED_BYTES = 4 << 20
"""For the candidates' vectors in hand, in single and double precision."""
CPU_BLOCK = 8192
"""Vectors multiplied at once: their float32 copy should fit the cache."""


class Scan(Protocol):
    """A structure that knows the nearest vectors, by inner product."""

    def __len__(self) -> int:
        """How many vectors there are."""
        ...

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        ...

    def search(self, queries: Vectors, k: int) -> list[Found]:
        """The nearest vectors to each query."""
        ...


@dataclass(frozen=True, slots=True)
class Extent:
    """What bounds the rounding errors of a set of vectors."""

    dimension: int
    largest_norm: float
    float16: bool
    """Whether float16 holds them without loss."""

    FILE = "vectors.json"

    @classmethod
    def of(cls, blocks: Iterator[Vectors]) -> Extent:
        """Measure vectors, given in blocks."""
        dimension, largest, float16 = 0, 0.0, True
        for block in blocks:
            dimension = block.shape[1]
            largest = max(largest, float(np.sqrt(np.square(block, dtype=np.float64).sum(axis=1).max())))
            float16 = float16 and bool((block.astype(np.float16) == block).all())
        return cls(dimension, largest, float16)

    def save(self, folder: Path) -> None:
        """Write into an index folder."""
        write_json(folder / self.FILE, {name: getattr(self, name) for name in self.__slots__})

    def slack(self, queries: Vectors, *, half: bool) -> NDArray[np.float64]:
        """How far a computed score can be from the true one, for each query.

        With `half`, queries and vectors are rounded to float16 before they are multiplied; sums are in float32
        either way, of `dimension` terms (Higham 2002, section 3.1; doubled, for tensor cores cut off, not round).
        """
        norms = np.linalg.norm(queries.astype(np.float64), axis=1)
        errors = 4 * self.dimension * 2.0**-24 * norms
        if half:
            errors += np.linalg.norm(queries.astype(np.float64) - queries.astype(np.float16), axis=1)
            errors += 0.0 if self.float16 else 2.0**-10 * norms
        bounds: NDArray[np.float64] = errors * self.largest_norm
        return bounds


def scores_of(queries: Vectors, vectors: Vectors) -> Vectors:
    """Inner products of each query (n, dimension) with vectors of its own (n, m, dimension).

    In double precision, each by itself, rounded once: independent of what else is computed beside it.
    """
    products = np.vecdot(vectors.astype(np.float64), queries.astype(np.float64)[:, None])
    return np.asarray(products, np.float32)


def best(rows: Rows, scores: Vectors, k: int) -> Found:
    """The k highest scores and all that equal the last of them, in order."""
    if len(rows) > k:
        kept = scores >= np.partition(scores, -k)[-k]
        rows, scores = rows[kept], scores[kept]
    order = np.lexsort((rows, -scores))
    return rows[order], scores[order]


Nearest = Callable[[Vectors, int], tuple[Vectors, Rows]]
"""Scores (high to low) and rows of about the nearest m; row -1 for none."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """What finds candidates for an exact search among `total` vectors."""

    nearest: Nearest
    vectors: Callable[[Rows], Vectors]
    """The vectors of some rows, without loss."""
    total: int


def exact_search(queries: Vectors, k: int, among: Candidates, slack: NDArray[np.float64]) -> list[Found]:
    """The exact k nearest, by way of candidates whose scores are at most `slack` away from the truth."""
    found: list[Found] = [(np.zeros(0, np.int64), np.zeros(0, np.float32))] * len(queries)
    total, size = among.total, queries.shape[1]
    waiting, asked = np.arange(len(queries)), min(k + SPARE, total)
    while len(waiting):
        unsure: list[int] = []
        for group in _groups(waiting, 12 * asked, WORKING_BYTES):
            near, rows = among.nearest(queries[group], asked)
            # Nothing outside scores more than the last candidate, as far as that score is right.
            outside = (near[:, -1] + slack[group]).astype(np.float32)
            for some in _groups(np.arange(len(group)), 12 * asked * size, CACHED_BYTES):
                vectors = among.vectors(rows[some].ravel()).reshape(len(some), asked, size)
                scores = scores_of(queries[group[some]], vectors)
                for i, own in zip(some.tolist(), scores, strict=True):
                    place = int(group[i])
                    found[place] = best(rows[i], own, k)
                    if asked < total and outside[i] >= found[place][1][k - 1]:
                        unsure.append(place)
        waiting, asked = np.array(unsure, np.int64), min(2 * asked, total)
    return found


def tied_search(queries: Vectors, k: int, nearest: Nearest, total: int) -> list[Found]:
    """The k nearest by scores that are what they are, asking for more while the k-th ties with what follows."""
    found: list[Found] = [(np.zeros(0, np.int64), np.zeros(0, np.float32))] * len(queries)
    waiting, asked = np.arange(len(queries)), min(k + 1, total)
    while len(waiting):
        tied: list[int] = []
        for group in _groups(waiting, 12 * asked, WORKING_BYTES):
            scores, rows = nearest(queries[group], asked)
            # Nearly always all scores differ, and what was found is the answer as it stands.
            clear = (scores[:, 1:] < scores[:, :-1]).all(axis=1) & (rows[:, -1] >= 0)
            heads = zip(rows[:, :k], scores[:, :k], strict=True)
            for place, head, different, near, own in zip(
                group.tolist(), heads, clear.tolist(), scores, rows, strict=True
            ):
                if different:
                    found[place] = head
                    continue
                real = own >= 0
                found[place] = best(own[real], near[real], k)
                if asked < total and real.all() and near[-1] == near[k - 1]:
                    tied.append(place)
        waiting, asked = np.array(tied, np.int64), min(2 * asked, total)
    return found


def _groups(places: Rows, each: int, room: int) -> list[Rows]:
    """The places, in groups of as many as fit the room at so many bytes each."""
    return np.array_split(places, min(-(-len(places) * each // room), len(places)))


class TorchScan:
    """Multiplies queries with all vectors, block by block, and keeps the best.

    On a CPU the files stay memory-mapped and each block is brought to float32; on CUDA devices, all of those that
    there are, the vectors are put there once, as float16.

    Args:
        shards: arrays of vectors (n, dimension), float16 or float32; those of files memory-mapped with mode `c`.
        extent: of all of them.
        device: `cpu`, `cuda` for all GPUs, or one of them.
    """

    def __init__(self, shards: Sequence[NDArray[Any]], extent: Extent, device: str = "cpu") -> None:
        import torch

        self._extent = extent
        self._starts = np.cumsum([0, *map(len, shards)])
        files = [(int(first), torch.from_numpy(own)) for first, own in zip(self._starts, shards, strict=False)]
        self._half = device.startswith("cuda")
        if self._half:
            devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if device == "cuda" else [device]
            self._parts = on_devices(files, devices)
        else:
            self._parts = files
        self._exact = self._parts if extent.float16 else files

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dimension(self) -> int:
        """See `Scan`."""
        return self._extent.dimension

    def search(self, queries: Vectors, k: int) -> list[Found]:
        """See `Scan`."""
        slack = self._extent.slack(queries, half=self._half)
        among = Candidates(self._nearest, self._vectors, len(self))
        return exact_search(queries, min(k, len(self)), among, slack)

    def _vectors(self, rows: Rows) -> Vectors:
        import torch

        found = np.empty((len(rows), self.dimension), np.float32)
        numbers = np.searchsorted([first for first, _ in self._exact], rows, "right") - 1
        for number in np.unique(numbers).tolist():
            own = numbers == number
            first, part = self._exact[number]
            found[own] = part[torch.from_numpy(rows[own] - first).to(part.device)].float().cpu().numpy()
        return found

    def _nearest(self, queries: Vectors, asked: int) -> tuple[Vectors, Rows]:
        import torch

        with torch.inference_mode():
            tops = [self._top(torch.from_numpy(queries), first, part, asked) for first, part in self._parts]
            scores, rows = _merged([(values.cpu(), places.cpu()) for values, places in tops], asked)
        return scores.numpy(), rows.numpy()

    def _top(
        self, queries: torch.Tensor, first: int, part: torch.Tensor, asked: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        queries = queries.to(part.device, part.dtype if self._half else None)
        room = (GPU_BYTES if self._half else WORKING_BYTES) // (4 * len(queries))
        step = max(room if self._half else min(room, CPU_BLOCK), 1024)
        tops: list[tuple[torch.Tensor, torch.Tensor]] = []
        for start in range(0, len(part), step):
            scores = _products(queries, part[start : start + step])
            values, places = scores.topk(min(asked, scores.shape[1]), dim=1)
            tops = [_merged([*tops, (values, places + (first + start))], asked)]
        return tops[0]


Part = tuple[int, "torch.Tensor"]
"""The row of its first vector, and the vectors."""


def on_devices(files: Sequence[Part], devices: Sequence[str]) -> list[Part]:
    """Copies of the files in float16, in their order, about as many rows on each device."""
    import torch

    starts = [*(first for first, _ in files), files[-1][0] + len(files[-1][1])]
    cuts = np.searchsorted(starts, np.linspace(0, starts[-1], len(devices) + 1)).tolist()
    parts: list[Part] = []
    for device, (low, high) in zip(devices, pairwise(cuts), strict=True):
        if low == high:
            continue  # more devices than files
        shape = (starts[high] - starts[low], files[low][1].shape[1])
        part = torch.empty(shape, dtype=torch.float16, device=device)
        for first, own in files[low:high]:
            part[first - starts[low] : first - starts[low] + len(own)] = own
        parts.append((starts[low], part))
    return parts


def _products(queries: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    import torch

    if block.is_cuda:
        return torch.mm(queries, block.T, out_dtype=torch.float32)
    return queries @ block.float().T


def _merged(tops: list[tuple[torch.Tensor, torch.Tensor]], asked: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of several lists; there is always at least one."""
    import torch

    if len(tops) == 1:
        return tops[0]
    scores = torch.cat([values for values, _ in tops], dim=1)
    kept, places = scores.topk(min(asked, scores.shape[1]), dim=1)
    return kept, torch.cat([rows for _, rows in tops], dim=1).gather(1, places)
