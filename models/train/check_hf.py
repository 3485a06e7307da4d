"""Compares this network with `DeepseekV3ForCausalLM` of transformers: same exported checkpoint, same tokens, float32.

    python check_hf.py [CHECKPOINT]     # without one: random weights and random gate biases
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "eval"))
import export
from hf import load_hf
from net import Net
from shape import CONFIG


def main() -> None:
    torch.manual_seed(0)
    net = Net(CONFIG, torch.float32)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch)
        if len(sys.argv) == 1:
            for moe in net.moes():
                moe.bias.uniform_(-0.2, 0.2)
            net.lm_head.normal_()
            export.write(net, folder)
        export.load_rounded(net, folder)
        reference = load_hf(folder, torch.float32)
        for length in (1, 300, 3000):
            tokens = torch.randint(0, CONFIG["vocab_size"], (length,))
            mine = net(tokens, tokens.roll(-1), ((1, length),))[0]
            theirs = reference(tokens[None]).logits[0]
            worst = (mine - theirs).abs().max().item()
            print(f"{length} tokens: logits differ by at most {worst:.2e} (largest logit {theirs.abs().max():.1f})")
            assert worst < 2e-3, "the training network is not DeepSeek-V3 as transformers computes it"


if __name__ == "__main__":
    main()
