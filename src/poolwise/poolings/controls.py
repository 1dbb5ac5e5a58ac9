"""Capacity controls: the trainable heads without their attention. What they gain is no merit of a learned pooling."""

from __future__ import annotations

from torch import Tensor

from poolwise.poolings.heads import Head, attended, last_token, weighted_mean


class FeedForwardHead(Head):
    """Capacity control: the trainable head without its attention, around one vector pooled without weights.

        X = Z + norm(p) W_v W_o        Y = X + (A * gelu(G)) W_2 + b_2,  A, G = norm(X) W_1 + b_1        out = mean Y

    Every latent gets the pooled vector p where the trainable pooling gives it what it attended to. What it shows: how
    much of a gain of the trainable pooling comes from more weights and a non-linearity after a plain pooling.

    Matched with `cross_attention` of the same arguments: latents, norms of states and feed-forward, the feed-forward,
    the first weights of equal name and shape, the scale of the first output (W_v W_o is the identity at the start), and
    the number of parameters: W_v and W_o are twice as wide, which makes up for the missing W_q and W_k exactly, so that
    only the norm of the queries is missing (2·D parameters; D with rms_norm). Nothing is left without a gradient.
    Not matched: W_v W_o is a product without a non-linearity, so its double width adds parameters, not functions; the
    value path costs fewer FLOPs, for it runs once for a text; layer weights W (L·D parameters) have no counterpart.
    """

    single = True

    def __init__(
        self,
        hidden_size: int,
        n_layers: int,
        *,
        latents: int,
        heads: int,
        head_dim: int,
        ffn: int = 4,
        norm: str = "layer_norm",
        init: str = "identity",
    ):
        width = 2 * heads * head_dim
        super().__init__(hidden_size, latents=latents, value_width=width, ffn=ffn, norm=norm, init=init)
        self.reset_parameters()

    def pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """The vector without weights that the head is put around: (B, N, D), (B, N) -> (B, D) fp32."""
        raise NotImplementedError

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """States (B, N, D), mask (B, N) or None -> (B, D) fp32, not normalised."""
        pooled = self.pool(states, mask)
        if folded := self.folded():
            return folded(pooled[:, None], None)
        value = self.to_out(self.to_v(self.norm_states(pooled)))
        return self.feed_forward(self.latents.float() + value[:, None])


class LastTokenFFN(FeedForwardHead):
    """The capacity control around the last token; see `FeedForwardHead`."""

    def pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        return last_token(states, mask)


class MeanFFN(FeedForwardHead):
    """The capacity control around the mean over tokens; see `FeedForwardHead`."""

    def pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        return weighted_mean(states, attended(states, mask))
