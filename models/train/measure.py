"""Expert balance by task, and how often the MTP layer's draft is what the network says next.

    python measure.py ../demo [--each 12]

Balance is mean over max of tokens per expert, averaged over the MoE layers: 1 is even. Drafts are counted in answers
only, on held-out conversations with the right answers fed in.
"""

import argparse
import random
from pathlib import Path

import torch

import export
from net import Net
from shape import CONFIG
from stream import ANSWER, Encoder
from tasks import mix


@torch.inference_mode()
def measure(net: Net, documents) -> tuple[float, int, int]:
    """-> (balance, drafts that hit, drafts)."""
    total, hits, drafts = 0, 0, 0
    for ids, marks in documents:
        ids, marks = torch.tensor(ids).long(), torch.tensor(marks)
        logits, drafted, loads = net(ids, ids.roll(-1), ((1, len(ids)),))
        # The MTP layer is left out, as its load follows its own inputs.
        total = total + loads[:-1].float()
        # Position i drafts token i+2; the network itself says it at i+1.
        counted = (marks[1:-1] == ANSWER) & (marks[2:] == ANSWER)
        same = drafted.argmax(-1)[:-2] == logits.argmax(-1)[1:-1]
        hits += (same & counted).sum().item()
        drafts += counted.sum().item()
    return (total.mean(1) / total.amax(1)).mean().item(), hits, drafts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--each", type=int, default=12, help="held-out conversations of each kind")
    args = parser.parse_args()
    net = Net(CONFIG)
    export.load_rounded(net, args.model)
    encoder, everything = Encoder(args.model), []
    print("| kind | expert balance | drafts accepted |\n|---|---|---|")

    def row(kind: str, documents) -> None:
        balance, hits, drafts = measure(net, documents)
        print(f"| {kind} | {balance:.2f} | {100 * hits / drafts:.1f} % |", flush=True)

    for kind in mix.KINDS:
        rng = random.Random(kind)
        documents = encoder.encode([mix.draw(rng, True, kind) for _ in range(args.each)])
        everything += documents
        row(kind, documents)
    row("**all kinds together**", everything)


if __name__ == "__main__":
    main()
