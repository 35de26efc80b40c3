"""Explicit Runge-Kutta methods as data.

From y at the time t a step of size h evaluates k_i = f(t + c_i h, y + h sum_j a_ij k_j) and ends in

    y(t + theta h) = y + h sum_i b_i(theta) k_i,    b_i(theta) = sum_p dense[i][p] theta^(p + 1),  b_i(1) = b_i.

The error of an adaptive method's step is h sum_i error_i k_i. With ``fsal`` the last k is the first of the next step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["DEGREE", "METHODS", "Method"]

Row = tuple[float, ...]
DEGREE = 4  # of the polynomials b_i(theta), lower ones padded with zeros


@dataclass(frozen=True)
class Method:
    """A tableau of s stages."""

    name: str
    order: int
    """Of the solution; steps grow with the error's root of this order."""
    a: tuple[Row, ...]
    """Row i has the i coefficients of stage i; the first is empty."""
    b: Row
    c: Row
    error: Row = ()
    """Weights of the solution less those of the embedded one; without them all steps are fixed."""
    dense: tuple[Row, ...] = field(default=())
    """[s, up to DEGREE]; linear, theta b_i, where not given."""
    fsal: bool = False

    @property
    def stages(self) -> int:
        return len(self.b)

    def weights(self) -> list[list[float]]:
        """The polynomials [s, DEGREE]."""
        rows = self.dense or tuple((b,) for b in self.b)
        return [[*row, *(DEGREE - len(row)) * [0.0]] for row in rows]

    def pack(self) -> list[float]:
        """What a kernel reads: s, order, fsal, adaptive?, c [s], a [s, s] (zero from the diagonal on), b [s],
        error [s] (zeros where there is none), dense [s, DEGREE]."""
        s = self.stages
        square = [value for row in self.a for value in (*row, *(s - len(row)) * [0.0])]
        header = [float(s), float(self.order), float(self.fsal), float(bool(self.error))]
        error = self.error or s * (0.0,)
        return [*header, *self.c, *square, *self.b, *error, *(v for row in self.weights() for v in row)]


def _cubic(b: Row) -> tuple[Row, ...]:
    """The polynomial through y and f at both ends of a step (Hermite)."""
    rows = []
    for i, end in enumerate(b):
        first, last = float(i == 0), float(i + 1 == len(b))  # the slopes at the ends are the first and the last k
        rows.append((first, 3 * end - 2 * first - last, first + last - 2 * end))
    return tuple(rows)


def _quartic(b: Row, middle: Row) -> tuple[Row, ...]:
    """The polynomial through y, f at both ends of a step and y in its middle, y + h sum_i middle_i k_i."""
    rows = []
    for i, (end, mid) in enumerate(zip(b, middle, strict=True)):
        first, last = float(i == 0), float(i + 1 == len(b))
        rows.append(
            (
                first,
                last - 4 * first - 5 * end + 16 * mid,
                5 * first - 3 * last + 14 * end - 32 * mid,
                2 * (last - first) - 8 * end + 16 * mid,
            )
        )
    return tuple(rows)


EULER = Method("euler", 1, ((),), (1.0,), (0.0,))
MIDPOINT = Method("midpoint", 2, ((), (1 / 2,)), (0.0, 1.0), (0.0, 1 / 2))
# Kutta's 3/8 rule: a smaller error than the classical weights for the same work
RK4 = Method(
    "rk4",
    4,
    ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    (0.0, 1 / 3, 2 / 3, 1.0),
)

# Bogacki and Shampine 1989. Not torchdiffeq's interpolant, whose middle of a step is right to first order only: its
# outputs at a tolerance of 1e-6 are off by 1e-4.
_BOSH3 = (2 / 9, 1 / 3, 4 / 9, 0.0)
BOSH3 = Method(
    "bosh3",
    3,
    ((), (1 / 2,), (0.0, 3 / 4), _BOSH3[:3]),
    _BOSH3,
    (0.0, 1 / 2, 3 / 4, 1.0),
    error=tuple(b - e for b, e in zip(_BOSH3, (7 / 24, 1 / 4, 1 / 3, 1 / 8), strict=True)),
    dense=_cubic(_BOSH3),
    fsal=True,
)

# Dormand and Prince 1980; the middle of a step by Shampine 1986
_DOPRI5 = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
DOPRI5 = Method(
    "dopri5",
    5,
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5[:6],
    ),
    _DOPRI5,
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    # 1951/21600 ... 1/60: the weights of the fourth-order solution that torchdiffeq's control is built on
    error=tuple(
        b - e
        for b, e in zip(
            _DOPRI5,
            (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60),
            strict=True,
        )
    ),
    dense=_quartic(
        _DOPRI5,
        (
            6025192743 / 30085553152 / 2,
            0.0,
            51252292925 / 65400821598 / 2,
            -2691868925 / 45128329728 / 2,
            187940372067 / 1594534317056 / 2,
            -1776094331 / 19743644256 / 2,
            11237099 / 235043384 / 2,
        ),
    ),
    fsal=True,
)

# Tsitouras 2011, with the interpolant of that paper, https://doi.org/10.1016/j.camwa.2011.06.002
_TSIT5 = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
    0.0,
)
TSIT5 = Method(
    "tsit5",
    5,
    (
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.495539342889836, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        _TSIT5[:6],
    ),
    _TSIT5,
    (0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    error=(
        0.0017800110522257773,
        0.0008164344596567463,
        -0.007880878010261994,
        0.1447110071732629,
        -0.5823571654525552,
        0.45808210592918686,
        -1 / 66,
    ),
    dense=(
        (1.0, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
        (0.0, 0.1317, -0.2234, 0.1017),
        (0.0, 3.930296236894751, -5.941033872131505, 2.490627285651253),
        (0.0, -12.411077166933676, 30.338188630282318, -16.548102889244902),
        (0.0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
        (0.0, -27.896526289197286, 65.09189467479368, -34.87065786149661),
        (0.0, 1.5, -4.0, 2.5),
    ),
    fsal=True,
)

METHODS: dict[str, Method] = {m.name: m for m in (EULER, MIDPOINT, RK4, BOSH3, DOPRI5, TSIT5)}
