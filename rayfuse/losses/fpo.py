"""Preference optimisation against fused teachers: their sequence log-probabilities stand in for DPO's reference.

Shapes: S teachers, N responses (or pairs of responses). Every log-probability is that of a whole response divided by
its number of tokens under the model's own tokenizer, the end of turn counted (InfiFPO, arXiv 2505.13878, eq. 10).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch.nn import functional as F

from rayfuse.errors import LossError

CONFIDENCE_EPS = 1e-6
Side = Literal["chosen", "rejected"]


def fuse_logps(
    teachers: torch.Tensor,
    initial: torch.Tensor,
    policy: torch.Tensor,
    *,
    side: Side,
    rule: Literal["max_margin", "mean", "confidence"] = "max_margin",
    clip: bool = True,
    answered: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """One fused log-probability per response [N], without gradient, from teachers [S, N].

    clip (eq. 11): a teacher that likes a chosen response less than the initial pivot does, or a rejected one more, is
    set to `initial` [N] there. Where the policy is the initial pivot no pair then starts with a positive margin.
    Then, by `rule`:
    - max_margin (eq. 12): the teacher whose probability is farthest from the policy's, |exp(lp_i) - exp(lp_policy)|;
      the likelier one where several are equally far. It is compared in the log domain, where sums over long responses
      do not vanish. `policy` [N] is the current policy, or `initial` to fuse only once.
    - mean: the mean of the teachers (app. D).
    - confidence: their mean weighted by 1 / (-lp_i + 1e-6), weights normalised to sum 1 (app. D).
    answered: [S, N] bool, which teachers have a say where; None: all. The others' values are not looked at.
    weights: [S] positive, how much each teacher counts in mean and confidence; None: all the same.
    The order of the teachers changes nothing, to the bit.

    float32 (float64 stays float64), O(S N). Raises LossError on shapes that do not match, an unknown side or rule, and
    on values that are not finite log-probabilities (1e-4 above 0 passes as rounding).

    Paper: InfiFPO (arXiv 2505.13878), eq. 11, eq. 12, fig. 1, app. D.
    """
    if teachers.ndim != 2 or len(teachers) == 0 or not teachers.shape[1:] == initial.shape == policy.shape:
        raise LossError(
            f"fuse_logps takes teachers [S, N], initial [N] and policy [N], got {tuple(teachers.shape)}, "
            f"{tuple(initial.shape)} and {tuple(policy.shape)}"
        )
    if side not in ("chosen", "rejected") or rule not in RULES:
        raise LossError(f"fuse_logps: side {side!r} must be chosen or rejected, rule {rule!r} one of {list(RULES)}")
    if answered is not None and (answered.shape != teachers.shape or not answered.any(dim=0).all()):
        raise LossError("fuse_logps: answered must be [S, N] like teachers, with at least one teacher per response")
    dtype = torch.promote_types(teachers.dtype, torch.float32)
    known_SN = teachers if answered is None else teachers.masked_fill(~answered, -1.0)
    for name, values in (("teachers", known_SN), ("initial", initial), ("policy", policy)):
        wrong = values[~(torch.isfinite(values) & (values <= 1e-4))]
        if len(wrong):
            raise LossError(
                f"fuse_logps: {name} must be finite log-probabilities per token, at most 0, got {wrong[:8].tolist()}"
            )
    teachers_SN, initial_N, policy_N = (values.detach().to(dtype) for values in (known_SN, initial, policy))
    if clip:
        bound = torch.maximum if side == "chosen" else torch.minimum
        teachers_SN = bound(teachers_SN, initial_N)
    here_SN = torch.ones_like(teachers_SN, dtype=torch.bool) if answered is None else answered
    if rule == "max_margin":
        return teachers_SN.gather(0, _winner([_log_margin(teachers_SN, policy_N), teachers_SN], here_SN)[None])[0]
    return MEANS[rule](*_in_order(teachers_SN, here_SN, weights))


def fuse_pairs(
    teachers: Mapping[str, torch.Tensor],
    initial: Mapping[str, torch.Tensor],
    policy: Mapping[str, torch.Tensor],
    *,
    rule: Literal["max_margin", "mean", "confidence"] = "max_margin",
    clip: bool = True,
    per: Literal["response", "pair"] = "response",
    answered: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Fused log-probabilities of all responses to N prompts, by side: [N] each, without gradient.

    Args:
        teachers: per side [S, N]; the side "rejected" is a rejected response, every other one a chosen response.
        initial, policy: per side [N].
        rule, clip: see fuse_logps.
        per: "response": fuse_logps on each side alone, as the paper does. "pair" [ours, max_margin only]: one teacher
            serves all responses to a prompt, the one with the largest sum over the sides of
            |exp(lp_i) - exp(lp_policy)|, so that both terms of a margin come from the same model.
        answered: [S, N] bool, which teachers have a say on which prompt; None: all.
        weights: [S], see fuse_logps.

    Raises LossError as fuse_logps, and where `per` is "pair" and the rule chooses no teacher.

    Paper: InfiFPO (arXiv 2505.13878), eq. 11 and 12.
    """
    if per not in ("response", "pair") or (per == "pair" and rule != "max_margin"):
        raise LossError(f"fuse_pairs: per {per!r} must be response, or pair with the rule max_margin (it is {rule!r})")
    kinds: dict[str, Side] = {side: "rejected" if side == "rejected" else "chosen" for side in teachers}
    if per == "response":
        return {
            side: fuse_logps(
                teachers[side],
                initial[side],
                policy[side],
                side=kind,
                rule=rule,
                clip=clip,
                answered=answered,
                weights=weights,
            )
            for side, kind in kinds.items()
        }
    here_SN = torch.ones_like(next(iter(teachers.values())), dtype=torch.bool) if answered is None else answered
    asked = {side: logps_SN.masked_fill(~here_SN, -1.0) for side, logps_SN in teachers.items()}
    bounded = {
        side: torch.stack(
            [fuse_logps(one_N[None], initial[side], policy[side], side=kind, clip=clip) for one_N in logps_SN]
        )
        for (side, kind), logps_SN in zip(kinds.items(), asked.values(), strict=True)
    }
    margins = [_log_margin(logps_SN, policy[side].detach().to(logps_SN.dtype)) for side, logps_SN in bounded.items()]
    winner_N = _winner([torch.stack(margins).logsumexp(dim=0), *bounded.values()], here_SN)
    return {side: logps_SN.gather(0, winner_N[None])[0] for side, logps_SN in bounded.items()}


def fpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    fused_chosen: torch.Tensor,
    fused_rejected: torch.Tensor,
    *,
    beta: float = 2.5,
    variant: Literal["fpo", "ipo"] = "fpo",
) -> torch.Tensor:
    """Loss per pair [N] of the policy's log-probabilities against the fused ones, all [N]; the fused are detached.

    With margin = (policy - fused)(chosen) - (policy - fused)(rejected):
    fpo: -log sigmoid(beta * margin) (eq. 13); ipo: (margin - 1 / (2 beta))^2.
    Where fused is the reference model's log-probability, these are length-normalised DPO and IPO.

    Raises LossError on shapes that do not match, an unknown variant, or beta <= 0.

    Paper: InfiFPO (arXiv 2505.13878), eq. 13; the IPO variant after arXiv 2310.12036.
    """
    _check_pairs(beta, policy_chosen, policy_rejected, fused_chosen, fused_rejected)
    if variant not in VARIANTS:
        raise LossError(f"fpo_loss: variant {variant!r} must be one of {list(VARIANTS)}")
    return VARIANTS[variant](_gain(policy_chosen, fused_chosen) - _gain(policy_rejected, fused_rejected), beta)


def wrpo_loss(
    policy_source: torch.Tensor,
    policy_pivot: torch.Tensor,
    policy_rejected: torch.Tensor,
    fused_source: torch.Tensor,
    fused_pivot: torch.Tensor,
    fused_rejected: torch.Tensor,
    *,
    alpha: float,
    beta: float = 2.5,
) -> torch.Tensor:
    """Loss per triple [N]: the best teacher-written response, the best of the pivot's own, and the rejected one.

    -log sigmoid(alpha beta d(source) + (1 - alpha) beta d(pivot) - beta d(rejected)), d = policy - fused. `alpha` in
    [0, 1] is how much the teachers' response counts; 0 is fpo_loss on the pivot's own.

    Raises LossError on shapes that do not match, alpha outside [0, 1], or beta <= 0.

    Paper: InfiFPO (arXiv 2505.13878), app. C, after weighted-reward preference optimisation (arXiv 2412.03187).
    """
    _check_pairs(beta, policy_source, policy_pivot, policy_rejected, fused_source, fused_pivot, fused_rejected)
    if not 0 <= alpha <= 1:
        raise LossError(f"wrpo_loss: alpha is {alpha}, it must be between 0 and 1")
    gain = alpha * _gain(policy_source, fused_source) + (1 - alpha) * _gain(policy_pivot, fused_pivot)
    return _sigmoid_loss(gain - _gain(policy_rejected, fused_rejected), beta)


def _log_margin(teachers_SN: torch.Tensor, policy_N: torch.Tensor) -> torch.Tensor:
    """log |exp(a) - exp(b)| = max(a, b) + log(1 - exp(-|a - b|)); minus infinity where they are equal."""
    gap_SN = (teachers_SN - policy_N).abs()
    return torch.maximum(teachers_SN, policy_N.expand_as(teachers_SN)) + (-torch.expm1(-gap_SN)).log()


def _winner(keys: Sequence[torch.Tensor], answered_SN: torch.Tensor) -> torch.Tensor:
    """Which teacher [N] has the largest first key [S, N]; of equal ones, the largest next key, and so on.

    Teachers that are equal in all keys are equal in what is fused, so that their order does not matter.
    """
    left_SN = answered_SN
    for key_SN in keys:
        kept_SN = key_SN.masked_fill(~left_SN, -torch.inf)
        left_SN = left_SN & (kept_SN == kept_SN.amax(dim=0))
    return left_SN.to(torch.int8).argmax(dim=0)


def _in_order(
    teachers_SN: torch.Tensor, answered_SN: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and weights [S, N] of each response's teachers, sorted: sums do not depend on their order.

    Weights are relative to the largest one, and 0 where a teacher did not answer.
    """
    weights_S = torch.ones(len(teachers_SN)) if weights is None else weights / weights.max()
    weights_SN = weights_S.to(teachers_SN)[:, None].expand_as(teachers_SN) * answered_SN
    lighter_first = weights_SN.sort(dim=0, stable=True).indices
    by_value = teachers_SN.gather(0, lighter_first).sort(dim=0, stable=True).indices
    order_SN = lighter_first.gather(0, by_value)
    return teachers_SN.gather(0, order_SN), weights_SN.gather(0, order_SN)


def _mean(teachers_SN: torch.Tensor, weights_SN: torch.Tensor) -> torch.Tensor:
    return (teachers_SN * weights_SN).sum(dim=0) / weights_SN.sum(dim=0)


def _confidence(teachers_SN: torch.Tensor, weights_SN: torch.Tensor) -> torch.Tensor:
    return _mean(teachers_SN, weights_SN * (teachers_SN.neg().clamp_min(0.0) + CONFIDENCE_EPS).reciprocal())


def _sigmoid_loss(margin_N: torch.Tensor, beta: float) -> torch.Tensor:
    return -F.logsigmoid(beta * margin_N)


def _squared_loss(margin_N: torch.Tensor, beta: float) -> torch.Tensor:
    return (margin_N - 1 / (2 * beta)).square()


MEANS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"mean": _mean, "confidence": _confidence}
RULES = ("max_margin", *MEANS)
VARIANTS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {"fpo": _sigmoid_loss, "ipo": _squared_loss}


def _gain(policy_N: torch.Tensor, fused_N: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(policy_N.dtype, torch.float32)
    return policy_N.to(dtype) - fused_N.detach().to(dtype)


def _check_pairs(beta: float, *logps: torch.Tensor) -> None:
    if any(values.shape != logps[0].shape or values.ndim != 1 for values in logps):
        raise LossError(f"preference losses take log-probabilities [N], got {[tuple(x.shape) for x in logps]}")
    if beta <= 0:
        raise LossError(f"beta is {beta}, it must be positive")
