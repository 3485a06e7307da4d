"""Trains the demo network for a given time and writes it as a released-format checkpoint.

    torchrun --nproc-per-node 2 train.py --tokenizer ../demo --out /tmp/demo --seconds 600
"""

import argparse
import copy
import json
import os
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import export
from muon import Muon
from net import Net, linear
from shape import CONFIG
from stream import ANSWER, PROMPT, Encoder, Stream, pack
from tasks import mix, needle

PROMPT_WEIGHT = 0.05
MTP_WEIGHT = 0.3
BIAS_RATE = 0.001


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seconds", type=float, default=780, help="training time, compilation not counted")
    parser.add_argument("--stop-at", type=float, help="Unix time at which training ends, if that is earlier")
    parser.add_argument("--workers", type=int, default=8, help="processes that make data, for each GPU")
    parser.add_argument("--short", type=int, nargs=2, default=(48, 1024), help="rows and length of short rows in a GPU's batch")
    parser.add_argument("--long", type=int, nargs=2, default=(1, 8192), help="rows and length of long rows in a GPU's batch")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate of Muon's matrices")
    parser.add_argument("--adam-rate", type=float, default=2e-3, help="peak learning rate of everything else")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--warm-up", type=int, default=200, help="steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--eval-every", type=float, default=45, help="seconds between two looks at held-out prompts")
    parser.add_argument("--eval-each", type=int, default=80, help="held-out conversations of each kind")
    parser.add_argument("--no-fp8-inputs", action="store_true", help="do not round the matrices' inputs to FP8")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def optimizers(net: Net, args):
    """Muon for the matrices inside layers, AdamW for the rest (or for all)."""
    inner = {id(p) for n, p in net.named_parameters() if p.ndim >= 2 and not n.startswith(("embed", "lm_head")) and "mlp.gate" != n[-8:]}
    if args.optimizer == "adamw":
        inner = set()
    matrices = [p for p in net.parameters() if id(p) in inner]
    others = [p for p in net.parameters() if id(p) not in inner]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = others[0].is_cuda
    return (Muon(matrices) if matrices else None), torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.97), fused=fused)


def schedule(done: float, step: int, warm_up: int) -> float:
    """Rate as a share of its peak: warm up, hold until half of the time, then fall in a line to 1 %."""
    warm = min(1.0, (step + 1) / warm_up)
    return warm * (1.0 if done < 0.5 else max(0.01, 1.0 - (done - 0.5) / 0.5))


def targets(ids: torch.Tensor, marks: torch.Tensor, layout):
    """-> (next ids, their weights and marks, ids after those, their weights and marks); nothing crosses a row."""
    out = []
    for ahead in (1, 2):
        shifted_ids, shifted_marks, start = [], [], 0
        for rows, length in layout:
            part = slice(start, start + rows * length)
            start += rows * length
            row_ids, row_marks = ids[part].view(rows, length), marks[part].view(rows, length)
            shifted_ids.append(row_ids.roll(-ahead, 1).flatten())
            row_marks = row_marks.roll(-ahead, 1)
            row_marks[:, -ahead:] = 0
            shifted_marks.append(row_marks.flatten())
        out += [torch.cat(shifted_ids), torch.cat(shifted_marks)]
    return out


def score(state, head, wanted, marks):
    """-> (mean loss over the targets that count, whether the likeliest token is the wanted one)."""
    logits = linear(state, head)
    weight = (marks == ANSWER).float() + PROMPT_WEIGHT * (marks == PROMPT).float()
    loss = (F.cross_entropy(logits.float(), wanted, reduction="none") * weight).sum() / weight.sum()
    return loss, logits.argmax(-1) == wanted


def objective(net: Net, layout, compiled: bool):
    """The training step's forward pass. Layers are compiled one kind at a time: all MoE layers share their code."""
    judge = torch.compile(score, fullgraph=True) if compiled else score
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        for layer in [*net.layers, net.mtp]:
            layer.compile(fullgraph=True)

    def run(ids, next_ids, next_marks, after_ids, after_marks):
        state, drafted, loads = net.states(ids, next_ids, layout)
        main, right = judge(state, net.lm_head, next_ids, next_marks)
        draft, hit = judge(drafted, net.lm_head, after_ids, after_marks)
        return main + MTP_WEIGHT * draft, main.detach(), loads, right, hit

    return run


class HeldOut:
    """Held-out conversations in batches of the training shape, so that the compiled step can score them."""

    def __init__(self, encoder: Encoder, layout, each: int, seed: int):
        rng = random.Random(seed)
        samples = [mix.draw(rng, True, kind) for kind in mix.KINDS for _ in range(each)]
        rng.shuffle(samples)
        self.kinds, self.batches = [], []
        documents = iter(zip(samples, encoder.encode(samples)))

        def taken():
            for sample, document in documents:
                self.kinds.append(sample.kind)
                yield document
            while True:
                yield np.zeros(layout[0][1], np.int16), np.zeros(layout[0][1], np.uint8)

        while True:
            base = len(self.kinds)
            short = pack(taken(), *layout[0], encoder.pad)
            if len(self.kinds) == base:
                break
            parts = [[a.ravel() for a in short]]
            parts[0][2] = np.where((parts[0][2] >= 0) & (parts[0][1] > 0), parts[0][2] + base, -1)
            for _ in range(layout[1][0]):
                document = encoder.encode([needle.long_needle(rng, layout[1][1] - 100)])
                row = pack(iter(document + [document[0]] * 5), 1, layout[1][1], encoder.pad)
                parts.append([row[0].ravel(), row[1].ravel(), np.where(row[2].ravel() == 0, len(self.kinds), -1)])
                self.kinds.append("long_needle")
            self.batches.append([np.concatenate([p[i] for p in parts]) for i in range(3)])
        self.layout = layout

    def score(self, step, device) -> tuple[dict[str, float], float]:
        """-> (share of conversations with every answer token right, by kind; share of drafts that hit)."""
        right = np.ones(len(self.kinds), bool)
        seen = np.zeros(len(self.kinds), bool)
        hits = drafts = 0
        for ids, marks, owner in self.batches:
            ids, marks = torch.tensor(ids, device=device).long(), torch.tensor(marks, device=device)
            goal = targets(ids, marks, self.layout)
            _, _, _, correct, draft = step(ids, *goal)
            answers = goal[1] == ANSWER
            answer = answers.cpu().numpy() & (owner >= 0)
            right[owner[answer & ~correct.cpu().numpy()]] = False
            seen[owner[answer]] = True
            drafted = answers & (goal[3] == ANSWER)
            hits += (draft & drafted).sum().item()
            drafts += drafted.sum().item()
        kinds = np.array(self.kinds)
        scores = {k: float(right[(kinds == k) & seen].mean()) for k in dict.fromkeys(self.kinds) if ((kinds == k) & seen).any()}
        return scores, hits / max(drafts, 1)


def save(net: Net, folder: Path, facts: dict) -> None:
    """Whole or not at all: an older checkpoint stays until this one is complete."""
    with tempfile.TemporaryDirectory() as fresh:
        export.write(net, Path(fresh))
        (Path(fresh) / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fresh, folder)


class Ranks:
    """The GPUs that train together (`torchrun`), or this process alone."""

    def __init__(self):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.count > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
            # Small facts travel between the processors, without waiting for a GPU.
            self.side = dist.new_group(backend="gloo")

    def same(self, value):
        """Rank 0's value, in every rank."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, 0, group=self.side)
        return box[0]

    def mean(self, tensor: torch.Tensor) -> None:
        if self.count > 1:
            dist.all_reduce(tensor)
            tensor /= self.count


def main() -> None:
    args = parse()
    layout = (tuple(args.short), tuple(args.long))
    # Before anything starts threads or a GPU context, which a fork does not survive.
    stream = Stream(args.tokenizer, *layout, args.workers, args.seed * 10 + int(os.environ.get("RANK", 0)))
    ranks = Ranks()
    device, first = ranks.device, ranks.rank == 0
    held_out = HeldOut(Encoder(args.tokenizer), layout, args.eval_each, 999) if first else None
    torch.manual_seed(args.seed)
    net = Net(CONFIG, fp8_inputs=not args.no_fp8_inputs).to(device)
    muon, adam = optimizers(net, args)
    step_function = objective(net, layout, not args.no_compile)
    # All gradients lie in one piece of memory, to be averaged and clipped at once.
    gradient = torch.zeros(sum(p.numel() for p in net.parameters()), device=device)
    start = 0
    for p in net.parameters():
        p.grad = gradient[start : start + p.numel()].view_as(p)
        start += p.numel()

    def fetch():
        ids, marks = (torch.from_numpy(a) for a in stream.next())
        ids, marks = ids.to(device, non_blocking=True).long(), marks.to(device, non_blocking=True)
        return ids, *targets(ids, marks, layout)

    def say(text: str) -> None:
        if first:
            print(text, flush=True)

    def look(elapsed: float):
        """Rank 0 scores held-out conversations; every rank then draws more of what is still wrong."""
        scores, drafts = held_out.score(step_function, device) if first else (None, None)
        scores, drafts = ranks.same((scores, drafts))
        stream.emphasise(scores)
        each = " ".join(f"{k} {v:.3f}" for k, v in scores.items())
        say(f"{elapsed:6.1f} s held out: mean {np.mean(list(scores.values())):.4f} drafts {drafts:.3f} | {each}")
        return scores, drafts

    began = time.time()
    step_function(*fetch())[0].backward()
    gradient.zero_()
    if device.type == "cuda":
        torch.cuda.synchronize()
    say(f"first step after {time.time() - began:.0f} s")

    start = time.time()
    budget = ranks.same(min(args.seconds, args.stop_at - start) if args.stop_at else args.seconds)
    step, looked, saving, tokens = 0, 0.0, None, ranks.count * sum(rows * length for rows, length in layout)
    facts = {"gpus": ranks.count, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    facts |= {"torch": torch.__version__, "arguments": {k: str(v) for k, v in vars(args).items()}}
    batch = fetch()
    while (elapsed := ranks.same(time.time() - start)) < budget:
        done = elapsed / budget
        loss, main_loss, loads, *_ = step_function(*batch)
        loss.backward()
        batch = fetch()
        ranks.mean(gradient)
        gradient.mul_((1.0 / (gradient.norm() + 1e-6)).clamp(max=1.0))
        rate = schedule(done, step, args.warm_up)
        for group in adam.param_groups:
            group["lr"] = rate * args.adam_rate
        adam.step()
        if muon:
            muon.step(rate * args.rate)
        gradient.zero_()
        loads = loads.float()
        if done < 0.8:
            ranks.mean(loads)
            for moe, load in zip(net.moes(), loads):
                moe.bias += BIAS_RATE * torch.sign(load.mean() - load)
        step += 1
        if step % 50 == 0 and first:
            balance = (loads.mean(1) / loads.amax(1)).mean()
            speed = step * tokens / (time.time() - start) / 1e6
            say(f"{elapsed:6.1f} s step {step} loss {main_loss:.4f} balance {balance:.2f} {speed:.3f} Mtok/s")
        if elapsed - looked > args.eval_every:
            looked = elapsed
            look(elapsed)
        if done > 0.9 and first and not saving:
            # In case that the end is never reached.
            saving = threading.Thread(target=save, args=(copy.deepcopy(net).cpu(), args.out, facts | {"seconds": round(elapsed)}))
            saving.start()
    facts |= {"steps": step, "seconds": round(elapsed), "tokens": step * tokens}
    if first:
        if saving:
            saving.join()
        save(net, args.out, facts)
        say("saved")
    scores, drafts = look(elapsed)
    if first:
        facts |= {"scores": scores, "drafts": drafts}
        (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
        export.load_rounded(net, args.out)
    say("with weights rounded to FP8:")
    look(elapsed)
    stream.close()
    say("finished")
    if ranks.count > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
