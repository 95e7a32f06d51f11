"""Explains the words of a plan, for `train.plan --glossary` and docs/scaling.md."""

import textwrap

WORDS = {
    "training, prefill, decoding": "The program that is planned: a step of training; reading "
    "prompts of --length tokens; one token for each row, behind --length tokens in the cache.",
    "mesh": "How many devices share what. data: rows, with a copy of the weights each; fsdp: rows "
    "and weights, which are gathered before use; fsdp_outer: the part of fsdp that gathers after "
    "the other, split off on a torus of three dimensions; context: the tokens of a row; tp: heads, "
    "feed-forward width and vocabulary.",
    "rows": "Sequences of a batch, over all devices together (--batch).",
    "remat": "What the backward pass computes again instead of keeping it: full, all of a layer; "
    "projections, what lies between the large products; none.",
    "parts": "In how many parts a step computes its batch, one after the other (--accumulate).",
    "gradients summed in": "The type of the sums of gradients over the mesh (--gradient-dtype).",
    "sequence parallel": "Whether the residual stream is split over tp by tokens too, so that each "
    "device of tp keeps a part of it, and not the whole.",
    "attention": "The implementation of attention that the program was compiled with; "
    "docs/attention.md says how auto takes one.",
    "weights, adapters": "Bytes of a device's part of the weights, and of those that are trained "
    "where they are adapters.",
    "optimiser": "The two moments of each trained weight, and the count of steps.",
    "batch": "Token ids and what goes with them; in decoding the state between two tokens.",
    "cache": "Keys and values of the tokens so far.",
    "padding": "What the hardware adds to arguments to lay them out.",
    "residuals": "What the forward pass keeps of each layer for the backward pass.",
    "temporaries": "What else exists while the program runs: gathered weights, gradients, "
    "activations of a layer.",
    "outputs": "Results that do not take the place of an argument.",
    "program": "The compiled instructions.",
    "needed, of, fits": "The sum of these, of the memory that a program may take on the device; "
    "what is left, or over.",
    "FLOPs, done": "Floating point operations that the model needs, of all devices; how many times "
    "as many the program does, as recomputation comes on top.",
    "collective": "An operation in which devices take part together. all-gather: each gets the "
    "parts of all; reduce-scatter: each gets its part of a sum; all-reduce: each gets the whole "
    "sum; all-to-all: each sends another part to each; collective-permute: each sends to one.",
    "axes, devices": "The mesh axes along which those devices differ, and how many take part.",
    "count, MB a device": "How often in a run of the program, and the size of all of the arrays "
    "together: whole, as an all-gather makes and a reduce-scatter takes it. *: in a loop of "
    "unknown length, for one pass.",
    "not known": "The compiled program could not be read. The times then lack the links, and what "
    "HBM moves of gathered weights.",
    "compute": "The time of the FLOPs that are done, at the published peak.",
    "HBM": "The time to move weights, state, residuals, cache and what is gathered, at the "
    "published bandwidth of the device's memory.",
    "ICI, on chip": "The time over the links between the chips of a TPU slice, and between the two "
    "cores of a chip.",
    "NVLink": "The time over the links between the GPUs of a host.",
    "InfiniBand": "The time over the network between hosts of GPUs.",
    "DCN": "The time over the data-centre network between TPU slices.",
    "in step": "A collective over several kinds of link goes piece by piece, so that they work at "
    "the same time; the slower one's time counts in serial.",
    "bound": "The longest of these times. No run is faster, as that one cannot be hidden.",
    "limit": "The name of the longest time.",
    "serial": "The sum of these times: what it takes where nothing overlaps. A run lies between, "
    "or above where it does not reach published rates; latency is left out of both.",
    "tokens/s": "Tokens of the batch over the bound: at most so many, of all devices.",
    "MFU": "Model FLOPs utilisation: the FLOPs that the model needs over those that all devices "
    "could do in that time. Recomputation does not count as work.",
}


def text() -> str:
    """Format all words and their meanings for a terminal, in the order of a plan."""
    wrapper = textwrap.TextWrapper(
        96, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
    )
    return "\n".join(f"{word}\n{wrapper.fill(meaning)}" for word, meaning in WORDS.items())
