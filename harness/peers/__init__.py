"""Engines that take per-example gradients from other libraries, to measure and check them in the same loop as ours.

Every peer is a :class:`Peer`: it takes part in any method, gives per-example gradients or norms as its library computes
them, and leaves the rule of clipping to the method (JAX Privacy, which only clips a whole gradient to one norm, serves
`Flat` and `Unclipped`). Importing this package imports none of the libraries; `PEERS[name]()` works without them, and
`accepts` then says what to install.

`opacus-hooks`
    Hooks with a formula for each kind of layer. nn.LSTM and nn.GRU are replaced by Opacus's own, in a copy. Refused:
    layers in eval mode or with buffers, nn.MultiheadAttention, nn.RNN; and where its formulas are wrong: convolutions
    that pad other than with zeros (norms are 4 to 8 % too small in our trials: clipped gradients exceed their bound),
    embeddings with a padding entry (it is given a gradient), nn.LayerNorm without bias (fails).
`opacus-functorch`
    The same hooks with `torch.func` through each layer: slower, and right where the formulas are wrong.
`opacus-ew`
    The expanded weights of PyTorch. Refused: every layer with parameters that they do not know, the padding entry as
    above, and nn.LSTM in float32 on a CPU.
`opacus-ghost`
    Ghost norms for nn.Linear and nn.Embedding, per-example gradients for all others, and a second backward pass. One
    clipping group. Refused: as `opacus-hooks`, and tied parameters. It fails on modules called twice, and on token
    numbers that are an expanded view. It underestimates float32 norms of large layers.
`backpack`
    The extension BatchGrad. Refused: every layer that it does not know, which is every normalisation and nn.GRU (it
    leaves their parameters without gradients, silently), padding="same" and padding other than with zeros (another
    gradient, silently), recurrent layers but a single one, embeddings in float64, tied parameters.
`jax-vmap`, `jax-privacy`
    `vmap` of `grad`, and `jax_privacy.clipping.clipped_grad`, compiled for a twin of the model in JAX
    (:mod:`harness.peers.twin`), on the same memory. Refused: a model with a module that no rule of the twin covers,
    losses but cross-entropy, and for `jax-privacy` the rules of clipping that it does not have. One infinity in a batch
    breaks the gradients of all its examples where a convolution has groups; such a batch is done again one by one.
    JAX takes all cores it may use, whatever PyTorch's number of threads.

Whatever a model does not show, such as a parameter used by a function that no hook sees, is found on its first batch:
a few norms are compared with the loop's, and a peer that differs is stopped with a RuntimeError that says by how much.

Not measured: fastDP (Bu et al., Differentially private optimization on large model at small cost, arXiv:2210.00038),
book-keeping for PyTorch. It is in no package registry. Its public code gives a module that is called several times in
one forward pass another gradient, with a relative error of 1.0, and says nothing.
"""

from harness.peers.compiled import Privacy, Vmapped
from harness.peers.hooks import BackPack, ExpandedWeights, Functorch, Ghost, Hooks
from harness.peers.peer import Peer

__all__ = ["PEERS", "Peer"]

PEERS: dict[str, type[Peer]] = {
    "opacus-hooks": Hooks,
    "opacus-functorch": Functorch,
    "opacus-ew": ExpandedWeights,
    "opacus-ghost": Ghost,
    "backpack": BackPack,
    "jax-vmap": Vmapped,
    "jax-privacy": Privacy,
}
