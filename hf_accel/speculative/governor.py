"""Decides how many tokens are drafted, and that none are where it does not pay.

With the chance a that a draft is accepted, a step with k drafts brings 1 + a + ... + a^k tokens (Leviathan et al. 2023,
arXiv:2211.17192, equation 1) and costs k drafts and a verification of k + 1 tokens; the k with the most tokens per
second wins, and plain decoding is k = 0. All three are followed as they change.

Drafts may fail, so they are paid from an account: tokens are drafted only if the call, were all of them wrong, would
then be behind plain decoding by no more than 0.8 of a plain step plus 1 % of the call.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel.speculative.costs import StepCosts

ALLOWANCE_STEPS = 0.8
ALLOWANCE_SHARE = 0.01
CREDIT_STEPS = 4.0  # of what was gained no more is kept to pay for what fails later
GAIN = 1.03  # drafts are made where they promise so many times the tokens per second of plain decoding


@dataclass(frozen=True)
class DraftLength:
    """How many tokens to draft, and how many tokens per second that promises."""

    tokens: int
    rate: float


class Account:
    """Plain steps lost (positive) or gained by speculation in one call."""

    def __init__(self) -> None:
        self.lost, self.steps = 0.0, 0.0

    def allows(self, risk: float) -> bool:
        """Return whether `risk` more plain steps may be lost."""
        return self.lost + risk <= ALLOWANCE_STEPS + ALLOWANCE_SHARE * self.steps

    def settle(self, cost: float, tokens: float) -> None:
        """Book a step that cost as much as `cost` plain steps and brought `tokens` tokens."""
        self.steps += cost
        self.lost = max(-CREDIT_STEPS, self.lost + cost - tokens)


@dataclass(frozen=True)
class Reading:
    """What recurrent states read again, as steps of which drafts were refused are undone as a whole.

    unread: tokens that the next step reads again, whatever it is. forgets: whether tokens that it accepts beside
    refused drafts have to be read again by the step after it.
    """

    unread: int = 0
    forgets: bool = False


def choose(
    chances: list[list[float]],
    draft_s: float,
    costs: StepCosts,
    account: Account,
    most: int,
    reading: Reading = Reading(),
) -> DraftLength:
    """Return how many tokens to draft.

    chances: per live row, the chance that its i-th draft is accepted once those before it are; a row that has fewer
    drafts than others gains nothing beyond them. draft_s: seconds per drafted token.
    """
    unread = reading.unread
    plain_s = costs.step(1 + unread)
    best = DraftLength(0, 1 / plain_s)
    expected = [1.0] * len(chances)
    reach = [1.0] * len(chances)
    for tokens in range(1, most + 1):
        for row, chain in enumerate(chances):
            reach[row] *= chain[tokens - 1] if tokens <= len(chain) else 0.0
            expected[row] += reach[row]
        seconds = tokens * draft_s + costs.step(tokens + 1 + unread)
        again_s = costs.step(2 + unread) - costs.step(1) if reading.forgets else 0.0  # nothing but the last token
        if not account.allows((seconds + again_s) / costs.step(1) - 1):
            break
        if reading.forgets:  # at most all but one, unless every draft is accepted
            seconds += (1 - min(reach)) * (costs.step(1 + tokens + unread) - costs.step(1))
        # the slowest row decides when a batch is done, the others how much is gained until then
        rate = (sum(expected) / len(expected) + min(expected)) / 2 / seconds
        if rate > best.rate * (GAIN if best.tokens == 0 else 1.0):
            best = DraftLength(tokens, rate)
    return best
