"""Which part of the keys keeps a rotary embedding: lanes, each a complex combination of keys at one frequency.

A rotary pair is a complex number, and a rotation commutes with every complex factor, so a lane may be any
complex-linear function of the keys of all heads (TransMLA's RoRoPE is the real, orthogonal special case), and may serve
any head at any frequency, as well as one rotation can stand for another over the distances that matter:
⟨e^{iφΔ}, e^{iθΔ}⟩ = E_p[e^{i(θ − φ)Δ}] under the attention's own distances Δ. (TransMLA's FreqFold takes it for 1.)
With white keys x the space of scores is then C^keys ⊗ L²(Δ), targets and lanes are vectors of it, and lanes are chosen
by orthogonal matching pursuit: the next is the top eigenvector of the residual's Gram matrix at the best frequency.
What needs no rotation is a lane at frequency 0; such lanes cost latent values instead and are free to differ by layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlacompile.convert.attend import halves_to_complex
from mlacompile.convert.calibrate import Pairs


@dataclass(frozen=True)
class Lanes:
    """``mix [P/2, G · D/2]`` complex: lane = mix · (complex keys of all heads); rotated at ``inv_freq [P/2]``."""

    mix: Tensor
    inv_freq: Tensor

    def of(self, keys: Tensor) -> Tensor:
        """Real lanes ``[B, P]``, neighbours being pairs, of keys ``[B, G, D]`` before rotation."""
        return torch.view_as_real(halves_to_complex(keys).flatten(1).to(self.mix.dtype) @ self.mix.T).flatten(1)


#: Squared length, of a lane of length 1, below which it adds nothing to the lanes before it.
_INSIDE = 1e-4


class Pursuit:
    """One layer's search for lanes. ``gains`` says what each frequency would bring, ``take`` adds the lane.

    With ``only``, lanes are at no other frequencies than these, and at none: the same lanes in less time.
    """

    def __init__(
        self, pairs: Pairs, inv_freq: Tensor, *, keys: int = 128, queries: int = 32, only: list[int] | None = None
    ) -> None:
        heads, groups = pairs.token.shape[0], pairs.k.shape[1]
        pair_count, device = inv_freq.numel(), pairs.k.device
        self.frequencies = torch.cat((inv_freq.double(), inv_freq.new_zeros(1).double()))  # the last: none
        weights = pairs.weight[..., None].expand_as(pairs.distance).flatten(1).double()
        total = weights.sum(1, keepdim=True)
        #: Frequencies that lanes may have, by number and, the last being none, in order; and where each of them is.
        self.open = [*(range(pair_count) if only is None else sorted(set(only))), pair_count]
        self._column = {index: column for column, index in enumerate(self.open)}
        # [H, open, F + 1]: ⟨e^{-iφΔ}, e^{-iθΔ}⟩ under each head's distances, of which there are few.
        far = int(pairs.distance.max()) + 1
        often = weights.new_zeros(heads, far).scatter_add_(1, pairs.distance.flatten(1).long(), weights) / total
        angle = -torch.arange(far, dtype=torch.float64, device=device)[:, None] * self.frequencies
        turned = torch.polar(torch.ones_like(angle), angle)
        self.overlap = (turned[:, self.open].mH * often[:, None]) @ turned
        # Second moment of the keys of all heads, and of a constant 1 that stands for their mean.
        token_weight = torch.zeros(pairs.k.shape[0], dtype=torch.float64, device=device)
        token_weight.index_add_(0, pairs.token.flatten(), (weights / total).flatten())
        k = halves_to_complex(pairs.k).flatten(1).to(torch.complex128)
        k = torch.cat((k, torch.ones_like(k[:, :1])), dim=1)
        moment = (k * token_weight[:, None]).T @ k.conj() / heads
        values, vectors = torch.linalg.eigh(moment)
        values, vectors = values[-keys:].clamp_min(1e-12), vectors[:, -keys:]
        self.colour = vectors * values.sqrt()  # k = colour x
        self.white = (vectors / values.sqrt()).mH  # x = white k
        # [H, queries, keys, D/2]: targets Q^{1/2} κ on x_m e^{-iθΔ}.
        half = pair_count
        moment_q = pairs.query.double() * (total / pairs.token[0].numel())[..., None]
        hermitian = torch.complex(
            moment_q[:, :half, :half] + moment_q[:, half:, half:], moment_q[:, half:, :half] - moment_q[:, :half, half:]
        )
        values_q, vectors_q = torch.linalg.eigh(hermitian)
        root = (vectors_q * values_q.clamp_min(0).sqrt()[:, None])[..., -queries:].mH  # [H, queries, D/2]
        of_group = self.colour[:-1].view(groups, pair_count, -1)[
            torch.arange(heads, device=device) // (heads // groups)
        ]
        target = torch.einsum("hrl,hlm->hrml", root, of_group)
        # The search that follows compares energies: single precision decides it as well, in half the time.
        self.target_gram = torch.einsum("hrml,hal->hrma", target, self.overlap[:, :, :-1]).to(torch.complex64)
        self.overlap = self.overlap.to(torch.complex64)
        #: ⟨x_m e^{-iφΔ}, target − its projection on the chosen lanes⟩: ``[H, queries, keys, open]``.
        self.residual = self.target_gram
        #: The chosen lanes of each head made orthogonal: ⟨x_m e^{-iφΔ}, u⟩, ``[H, lanes, keys, open]``; and themselves.
        self._basis = self.overlap.new_zeros(heads, 0, values.numel(), len(self.open))
        self.chosen: list[tuple[Tensor, int]] = []
        # A shift of all scores is free: so is the constant at frequency 0.
        constant = self.colour[-1].to(torch.complex64)
        self._add(constant / constant.norm(), pair_count)

    def _add(self, lane: Tensor, index: int) -> None:
        """Take ``lane [keys]`` at frequency ``index`` out of what remains, by a step of Gram-Schmidt."""
        column = self._column[index]
        seen = torch.einsum("m,ha->hma", lane, self.overlap[:, :, index])
        known = torch.einsum("m,hbm->hb", lane.conj(), self._basis[..., column]).conj()
        seen = seen - torch.einsum("hb,hbma->hma", known, self._basis)
        square = torch.einsum("m,hm->h", lane.conj(), seen[..., column]).real
        # What is left of a lane that lies among the others is rounding, which must not be made as long as a lane.
        shrink = torch.where(square > _INSIDE, square.clamp_min(_INSIDE).rsqrt(), 0.0)
        unit = seen * shrink[:, None, None]
        onto = torch.einsum("m,hrm->hr", lane.conj(), self.residual[..., column]) * shrink[:, None]
        self.residual = self.residual - onto[..., None, None] * unit[:, None]
        self._basis = torch.cat((self._basis, unit[:, None]), dim=1)
        self.chosen.append((lane, index))

    def gains(self) -> Tensor:
        """``[open]``: captured energy of the best lane at every open frequency, the last at none."""
        gram = torch.einsum("hrma,hrna->amn", self.residual, self.residual.conj())
        return torch.linalg.eigvalsh(gram)[:, -1]

    def take(self, index: int, count: int = 1) -> None:
        """Add the best ``count`` lanes at frequency ``index``."""
        residual = self.residual[..., self._column[index]].flatten(0, 1)
        gram = residual.T @ residual.conj()
        best = torch.linalg.eigh(gram).eigenvectors[:, -count:].flip(-1)
        for vector in best.T:
            self._add(vector, index)

    def take_latent(self, count: int) -> None:
        """Add ``count`` lanes at no frequency, four at a time: nearly the same lanes, in a quarter of the time."""
        for taken in range(0, count, 4):
            self.take(self.frequencies.numel() - 1, min(4, count - taken))

    def lanes(self) -> Lanes:
        """The rotary lanes chosen so far, in the order of their frequencies as they were taken."""
        rotary = [(w, index) for w, index in self.chosen if index < self.frequencies.numel() - 1]
        # w · x = (w · white) k; the constant's share would need a bias on the lane and is left out.
        mix = torch.stack([(w.to(torch.complex128) @ self.white)[:-1] for w, _ in rotary])
        return Lanes(mix, self.frequencies[[index for _, index in rotary]].float())


def choose_frequencies(pursuits: list[Pursuit], *, count: int, latent: int, importance: list[float]) -> list[int]:
    """Frequencies for ``count`` rotary lanes that all layers share, each layer having ``latent`` lanes at none first.

    ``importance`` weighs the layers' gains against each other. A few layers of a model speak for all.
    """
    for pursuit in pursuits:
        pursuit.take_latent(latent)
    chosen = []
    for _ in range(count):
        gain = torch.stack([weight * pursuit.gains() for weight, pursuit in zip(importance, pursuits)]).sum(0)
        chosen.append(pursuits[0].open[int(gain[:-1].argmax())])
        for pursuit in pursuits:
            pursuit.take(chosen[-1])
    return chosen


def lanes_at(pursuit: Pursuit, frequencies: list[int], *, latent: int) -> Lanes:
    """One layer's lanes at frequencies that were chosen, in their order."""
    pursuit.take_latent(latent)
    for index in frequencies:
        pursuit.take(index)
    return pursuit.lanes()
