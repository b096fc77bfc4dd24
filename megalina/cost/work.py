"""Work for a device: matrix products, bytes in its memory, kernels.  A FLOP is one multiplication or one addition."""

from dataclasses import dataclass


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
    """A part of an instruction's function, there and back."""

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
