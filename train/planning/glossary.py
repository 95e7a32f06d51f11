"""Explains the words of a plan, for `python train/plan.py --glossary` and docs/scaling.md."""

import textwrap

WORDS = {
    "training, prefill, decoding": "The program that the plan compiles: a training step; prefill "
    "of prompts of --length tokens; decoding of one token per row, with --length tokens in the KV "
    "cache.",
    "serving": "The programs of a serving engine (--serve): decode steps of all rows, prefill of "
    "prompts by chunks, and the small programs around them. The plan compiles all of them.",
    "mesh": "The number of devices along each mesh axis. data: data parallelism, with a copy of "
    "the weights on each device; fsdp: data parallelism with sharded weights, gathered before use; "
    "fsdp_outer: the second step of FSDP's collectives, along another dimension of a 3D torus; "
    "context: context parallelism, which splits the tokens of a row (ring attention); tp: tensor "
    "parallelism, which splits heads, feed-forward width and vocabulary.",
    "rows": "The sequences of a batch, summed over all devices (--batch). Of an engine: the "
    "requests that decode at a time (--rows); and the memory of their state, in which the history "
    "of chosen tokens is the largest part.",
    "pages": "The pieces of an engine's KV cache, each of --page tokens of one request, in all "
    "layers. A plan of serving has as many as an engine takes by default, and says how many fit at "
    "most.",
    "requests": "The requests of one length, prompt and new tokens together, whose pages fit into "
    "the cache at most. Those beyond the rows wait with their pages.",
    "prompt": "The time in which a prompt of this length is computed alone, by chunks.",
    "remat": "Rematerialisation: recomputing activations in the backward pass instead of storing "
    "them. full: all of a block; projections: all but the outputs of its projections; none: "
    "nothing.",
    "parts": "Gradient accumulation steps: the parts of a batch that a training step computes one "
    "after the other (--accumulate).",
    "gradients summed in": "The dtype in which gradients are reduced over the mesh "
    "(--gradient-dtype).",
    "sequence parallel": "Sequence parallelism: tp splits the residual stream by tokens, instead "
    "of each device of tp storing all of it.",
    "attention": "The implementation of attention in the compiled program; docs/attention.md says "
    "how auto chooses it.",
    "weights": "Memory of a device's shard of the weights; when adapters are trained, of the "
    "frozen weights.",
    "adapters": "Memory of a device's shard of the trained parameters, when these are adapters.",
    "optimiser": "Memory of the optimizer's state: two moments of each trained parameter, and the "
    "step count.",
    "batch": "Memory of the batch: token ids, labels, positions, segments and loss weights; in "
    "decoding, of the state between two tokens; in serving, of other arguments of the program that "
    "needs the most.",
    "cache": "Memory of the KV cache.",
    "padding": "Memory that the hardware's layout adds to the program's arguments.",
    "residuals": "Memory of the activations that the forward pass stores for the backward pass.",
    "temporaries": "Memory of all other intermediate results: gathered weights, gradients, and the "
    "activations of a block. In serving, of the program that needs the most, as programs run one "
    "after the other.",
    "outputs": "Memory of the results that do not reuse the memory of an argument.",
    "program": "Memory of the compiled instructions.",
    "needed, of, fits": "The memory that the program needs (the sum of the lines above), the "
    "memory that a program may use on the device, and the difference: GB left, or GB over.",
    "FLOPs, done": "The model's FLOPs, summed over all devices; and the ratio of the executed "
    "FLOPs to them, which recomputation raises.",
    "collective": "A communication operation among devices. all-gather: concatenates the shards of "
    "all devices on each; reduce-scatter: sums over devices and leaves each a shard of the sum; "
    "all-reduce: sums over devices and leaves each the whole sum; all-to-all: sends a different "
    "part from each device to each; collective-permute: sends from each device to one other.",
    "axes, devices": "The mesh axes that a collective communicates over, and the size of its "
    "groups of devices.",
    "count, MB a device": "The executions of a collective per run of the program, and the total "
    "size of its arrays on a device. The size of an all-gather is that of its result, of a "
    "reduce-scatter that of its operand. *: in a loop of unknown trip count, counted once.",
    "not known": "Marks collectives that could not be read from the compiled program. The times "
    "then omit the links, and the HBM traffic of gathered weights.",
    "compute": "The time of the executed FLOPs at the chip's published peak.",
    "HBM": "The time of the HBM traffic (weights, optimizer state, stored activations, KV cache "
    "and gathered weights) at its published bandwidth.",
    "ICI, on chip": "The time of collectives over the links between the chips of a TPU slice, and "
    "between the two cores of a chip.",
    "NVLink": "The time of collectives over the links between the GPUs of a host.",
    "InfiniBand": "The time of collectives over the network between GPU hosts.",
    "DCN": "The time of collectives over the data-centre network between TPU slices.",
    "in step": "Marks time in which a link works in parallel with a slower one, because a "
    "collective over both is pipelined. serial counts the slower link alone.",
    "bound": "A lower bound of the program's time: the longest of the times above, reached only if "
    "it hides all others.",
    "limit": "The name of the longest time.",
    "serial": "The sum of the times above: the program's time if nothing overlaps. A run takes a "
    "time between bound and serial, or longer if it does not reach the published rates; neither "
    "includes latency.",
    "tokens/s": "An upper bound of the throughput of all devices: the tokens of the batch divided "
    "by bound.",
    "MFU": "Model FLOPs utilisation: the model's FLOPs divided by the FLOPs that all devices could "
    "execute in the time of bound. Recomputation does not count.",
}


def text() -> str:
    """Format all words and their meanings for a terminal, in the order of a plan."""
    wrapper = textwrap.TextWrapper(
        96, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
    )
    return "\n".join(f"{word}\n{wrapper.fill(meaning)}" for word, meaning in WORDS.items())
