"""Work for a device: matrix products, bytes in its memory, kernels.  A FLOP is one multiplication or one addition."""

from dataclasses import dataclass

from megalina.blocks.activation import activation_of
from megalina.blocks.sizes import Rank


@dataclass(frozen=True, slots=True)
class Product:
    """A kernel of `count` products of [rows, inner] with [inner, columns]."""

    rows: float
    columns: float
    inner: float
    count: float
    num_bytes: float  # read and written in device memory
    wide: bool = False  # in float32 though the model's type is narrower
    attention: bool = False  # with the softmax in between, in one kernel

    @property
    def flops(self) -> float:
        return 2 * self.rows * self.columns * self.inner * self.count


@dataclass(frozen=True, slots=True)
class Work:
    """What is done in one go."""

    products: tuple[Product, ...] = ()  # each a kernel
    moved_bytes: float = 0.0  # read and written by kernels that only move data
    moving_kernels: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.moved_bytes + other.moved_bytes,
            self.moving_kernels + other.moving_kernels,
        )

    @property
    def flops(self) -> float:
        return sum(p.flops for p in self.products)

    @property
    def num_bytes(self) -> float:
        return self.moved_bytes + sum(p.num_bytes for p in self.products)

    @property
    def kernels(self) -> float:
        return len(self.products) + self.moving_kernels


@dataclass(frozen=True, slots=True)
class Piece:
    """What a function does, there and back."""

    forward: Work = Work()
    backward: Work = Work()  # the gradients of what it read
    weights: Work = Work()  # the gradients of its weights

    def __add__(self, other: "Piece") -> "Piece":
        return Piece(self.forward + other.forward, self.backward + other.backward, self.weights + other.weights)

    def repeated(self, count: int) -> "Piece":
        """The same so many times, each with kernels of its own."""
        return Piece(*(_repeated(work, count) for work in (self.forward, self.backward, self.weights)))


def small(kernels: float) -> Work:
    """Tensors are so small that what it takes is launches."""
    return Work((), 0.0, kernels)


def _repeated(work: Work, count: int) -> Work:
    return Work(work.products * count, work.moved_bytes * count, work.moving_kernels * count)


# pieces of which blocks are made
def moved(rank: Rank, forward: float, backward: float, kernels: float, kernels_back: float) -> Piece:
    """Kernels that read and write so many rows of the model's width."""
    row_bytes = rank.width * rank.element
    return Piece(Work((), forward * row_bytes, kernels), Work((), backward * row_bytes, kernels_back))


def linear(rank: Rank, rows: float, columns: float, inner: float, *, count: float = 1, wide: bool = False) -> Piece:
    """[rows, inner] times a weight of [columns, inner], `count` times with other weights, in one kernel each way."""
    element = rank.main if wide else rank.element
    weight, sides = columns * inner * count, (rows * inner + rows * columns) * count
    both = (sides + weight) * element
    adds = Work()
    to_main = 2 * weight * rank.main  # the product itself adds to the gradients ...
    if element != rank.main:  # ... unless they are wider
        adds, to_main = Work((), weight * (element + 2 * rank.main), 1), weight * element
    return Piece(
        Work((Product(rows, columns, inner, count, both, wide),)),
        Work((Product(rows, inner, columns, count, both, wide),)),
        Work((Product(columns, inner, rows, count, sides * element + to_main, wide),)) + adds,
    )


def norm(rank: Rank, tokens: float, width: float = 0) -> Piece:
    """Of the model's kind; with `width` RMSNorm of rows of so many numbers.  RMSNorm is made of several kernels, LayerNorm of
    one."""
    numbers = tokens * (width or rank.width)
    if rank.config.model.norm == "layernorm" and not width:
        return Piece(Work((), 2 * numbers * rank.element, 1), Work((), 3 * numbers * rank.element, 3))
    casts = numbers * (rank.element + rank.main) * rank.mixed
    return Piece(
        Work((), 5 * numbers * rank.main + 2 * casts, 7 + 2 * rank.mixed),
        Work((), 15 * numbers * rank.main + 3 * casts, 9 + 3 * rank.mixed),
    )


def residual(rank: Rank, tokens: float) -> Piece:
    """Backward: the gradients of both branches are added."""
    return moved(rank, 3 * tokens, 3 * tokens, 1, 1)


def mlp(rank: Rank, rows: float, d_ff: float, *, count: float = 1) -> Piece:
    """`count`: experts that have so many rows each, and share their kernels."""
    kind = activation_of(rank.config.model)
    first = linear(rank, rows, kind.inputs * d_ff, rank.width, count=count)
    number_bytes = rows * d_ff * count * rank.element
    if kind.clamps:
        activation = Piece(Work((), 16 * number_bytes, 7), Work((), 46 * number_bytes, 18))
    elif kind.inputs == 2:
        activation = Piece(Work((), 5 * number_bytes, 2), Work((), 14 * number_bytes, 5))
    else:
        activation = Piece(Work((), 2 * number_bytes, 1), Work((), 5 * number_bytes, 2))
    return first + activation + linear(rank, rows, rank.width, d_ff, count=count)
