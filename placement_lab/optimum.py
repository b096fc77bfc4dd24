"""The optimum: the placement with the smallest largest load, found by a solver; to compare others with, too slow to serve.

Rows of an expert may be split over its replicas at will: what `load_aware` and `local_first` of `megalina.placement.split` do, in
whole rows.  Needs scipy, which only the extra `dev` brings.

Shapes: E experts, N devices, P pairs (expert, device) in the order expert * N + device.
"""

from typing import Any

import numpy as np

from megalina.placement.placement import EMPTY, Placement, scaled_share
from megalina.placement.predictors.predictor import Floats

NEAR_ENOUGH = 1e-6  # of the optimum's value


def optimum(share_E: Floats, num_devices: int, slots_per_device: int, *, time_limit_s: float = 60.0) -> Placement:
    """The placement for an expected share of rows [E]; all zero means uniform.

    A mixed integer program: binary, whether device d holds expert e; continuous, the share of e that d computes.  With no time
    left the best placement so far.  ValueError where experts lack room; TimeoutError where none was found in time; ImportError
    without scipy."""
    share_E = scaled_share(share_E, num_devices, slots_per_device)
    num_experts, num_pairs = len(share_E), len(share_E) * num_devices
    scipy = _scipy()
    sparse, bounds, constraint = scipy.sparse, scipy.optimize.Bounds, scipy.optimize.LinearConstraint
    sum_E = sparse.kron(sparse.identity(num_experts), np.ones((1, num_devices)))  # [E, P]
    sum_N = sparse.kron(np.ones((1, num_experts)), sparse.identity(num_devices))  # [N, P]
    none_E, none_N, none_P = (sparse.csr_array((n, m)) for n, m in ((num_experts, 1), (num_devices, 1), (num_pairs, 1)))
    no_pairs_E, no_pairs_N = (sparse.csr_array((n, num_pairs)) for n in (num_experts, num_devices))
    share_P = np.repeat(share_E, num_devices)
    # unknowns: held [P], computed [P], the largest load
    rules = [
        constraint(sparse.hstack([no_pairs_E, sum_E, none_E]), share_E, share_E),  # all of an expert is computed
        constraint(sparse.hstack([sum_E, no_pairs_E, none_E]), 1, num_devices),  # each expert sits somewhere
        constraint(sparse.hstack([sum_N, no_pairs_N, none_N]), 0, slots_per_device),
        constraint(sparse.hstack([-sparse.diags(share_P), sparse.identity(num_pairs), none_P]), -np.inf, 0),  # only where it sits
        constraint(sparse.hstack([no_pairs_N, sum_N, -np.ones((num_devices, 1))]), -np.inf, 0),
    ]
    found = scipy.optimize.milp(
        np.append(np.zeros(2 * num_pairs), 1.0),
        integrality=np.append(np.ones(num_pairs), np.zeros(num_pairs + 1)),
        bounds=bounds(np.append(np.zeros(2 * num_pairs), 1 / num_devices), np.ones(2 * num_pairs + 1)),
        constraints=rules,
        options={"time_limit": time_limit_s, "mip_rel_gap": NEAR_ENOUGH},
    )
    if found.x is None:
        size = f"{num_experts} experts on {num_devices} devices"
        raise TimeoutError(f"no placement of {size} was found in {time_limit_s} s: raise time_limit_s")
    held_EN = found.x[:num_pairs].reshape(num_experts, num_devices) > 0.5
    devices = [np.flatnonzero(held_E).tolist() for held_E in held_EN.T]
    return Placement(num_experts, tuple((*d, *[EMPTY] * (slots_per_device - len(d))) for d in devices))


def smallest_largest_load(load_E: Floats, placement: Placement) -> float:
    """The largest load of a device where the loads of experts are split over replicas as well as can be: a linear program.

    In the unit of `load_E`.  In whole rows the optimum is this, rounded up: the program is a flow.  ImportError without scipy."""
    scipy = _scipy()
    pairs = [(expert, device) for expert, devices in enumerate(placement.copies()) for device in devices]
    sum_EP = np.zeros((placement.num_experts, len(pairs) + 1))
    sum_NP = np.zeros((placement.num_devices, len(pairs) + 1))
    for pair, (expert, device) in enumerate(pairs):
        sum_EP[expert, pair] = sum_NP[device, pair] = 1
    sum_NP[:, -1] = -1  # the largest load
    goal = np.append(np.zeros(len(pairs)), 1.0)
    found = scipy.optimize.linprog(goal, A_ub=sum_NP, b_ub=np.zeros(placement.num_devices), A_eq=sum_EP, b_eq=load_E)
    return float(found.fun)


def _scipy() -> Any:
    try:
        import scipy.optimize
        import scipy.sparse
    except ImportError as error:
        raise ImportError("the optimum is found by scipy, which is not installed: pip install 'megalina[dev]'") from error
    return scipy
