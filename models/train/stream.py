"""Training data made on the fly: processes draw conversations, tokenise them and pack them into rows."""

import itertools
import multiprocessing as mp
import os
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sample import PAD, segments
from tasks import mix, needle

# How a position counts as a target.
SKIP, PROMPT, ANSWER = 0, 1, 2


class Encoder:
    """Conversation -> (ids, marks). Pieces are cut at special tokens, so each is encoded alone."""

    def __init__(self, folder: Path):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.pad = self.tokenizer.token_to_id(PAD)

    def encode(self, samples: list) -> list[tuple[np.ndarray, np.ndarray]]:
        pieces = [segments(sample) for sample in samples]
        encoded = iter(self.tokenizer.encode_batch([text for piece in pieces for text, _ in piece], add_special_tokens=False))
        out = []
        for piece in pieces:
            ids, marks = [], []
            for _, written in piece:
                part = next(encoded).ids
                ids += part
                marks += [ANSWER if written else PROMPT] * len(part)
            out.append((np.array(ids, np.int16), np.array(marks, np.uint8)))
        return out


def pack(documents, rows: int, length: int, pad: int):
    """Fills rows with whole documents from the iterator, first fit. -> ids, marks, owner (document number or -1)."""
    ids = np.full((rows, length), pad, np.int16)
    marks = np.zeros((rows, length), np.uint8)
    owner = np.full((rows, length), -1, np.int32)
    waiting, number = [], 0
    for row in range(rows):
        at, misses = 0, 0
        while misses < 3:
            room = length - at
            fit = next((i for i, (_, d, _) in enumerate(waiting) if len(d) <= room), None)
            if fit is not None:
                n, d, m = waiting.pop(fit)
            else:
                d, m = next(documents)
                n, number = number, number + 1
                if len(d) > room:
                    # Wait for the next row, unless too much waits already.
                    if len(d) <= length and len(waiting) < 8:
                        waiting.append((n, d, m))
                    misses += 1
                    continue
            part = slice(at, at + len(d))
            ids[row, part], marks[row, part], owner[row, part] = d, m, n
            at += len(d)
    return ids, marks, owner


def short_documents(encoder: Encoder, rng: random.Random, weights):
    while True:
        yield from encoder.encode([mix.draw(rng, False, weights=list(weights)) for _ in range(256)])


def produce(queue, folder: Path, seed: int, rows: int, length: int, is_long: bool, weights) -> None:
    """Fills the queue for ever. A long row begins with one long text to search; short conversations fill it up."""
    os.nice(5)
    encoder, rng = Encoder(folder), random.Random(seed)
    short = short_documents(encoder, rng, weights)
    while True:
        first = encoder.encode([needle.long_needle(rng, length - 100)]) if is_long else []
        ids, marks, _ = pack(itertools.chain(first, short), rows, length, encoder.pad)
        queue.put((ids, marks))


class Stream:
    """Batches of `short` rows and `long` rows, each (rows, length), from `workers` processes."""

    def __init__(self, folder: Path, short: tuple[int, int], long: tuple[int, int], workers: int, seed: int):
        context = mp.get_context("fork")
        self.chunk = 16 if short[0] % 16 == 0 else short[0]
        self.short, self.long = short, long
        self.queues = [context.Queue(64), context.Queue(32)]
        # How often each kind is drawn; `emphasise` changes it while the processes run.
        self.weights = context.Array("d", mix.WEIGHTS, lock=False)
        self.processes = []
        for i in range(workers):
            is_long = i % 5 == 4 or i == workers - 1
            rows, length = (1, long[1]) if is_long else (self.chunk, short[1])
            process = context.Process(
                target=produce, args=(self.queues[is_long], folder, seed * 1000 + i, rows, length, is_long, self.weights), daemon=True
            )
            process.start()
            self.processes.append(process)

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """-> (ids, marks), each flat [short tokens + long tokens]."""
        parts = [self.queues[0].get() for _ in range(self.short[0] // self.chunk)]
        parts += [self.queues[1].get() for _ in range(self.long[0])]
        return tuple(np.concatenate([p[i].ravel() for p in parts]) for i in (0, 1))

    def emphasise(self, scores: dict[str, float]) -> None:
        """Draws a kind more often the further it is from being right: up to 3 times, down to 0.5 times its share."""
        for i, kind in enumerate(mix.KINDS):
            missing = 1.0 - scores.get(kind, 0.0)
            self.weights[i] = mix.WEIGHTS[i] * min(3.0, 0.5 + 12.0 * missing)

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
