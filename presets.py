# SPDX-License-Identifier: MIT
"""What train.py trains unless a flag says otherwise: flat dicts of flag names and values.

A name that begins with a stage (teacher_lr) holds for that stage and goes before the plain name; a
flag goes before both. train.py prints what holds.
"""
import math

PRESETS = {
    # 2 CPU cores, three to seven minutes for everything. Characters of Shakespeare.
    "laptop": dict(
        data="data/shakespeare.txt", tokenizer="char", block_size=64, wrap_eos=False,
        size="3x4x96", dropout=0.0, batch_size=64, micro_batch=64, save_every=100,
        dtype="float32",                    # at this width bfloat16 is slower, also with AMX
        warmup=50, lr_decay=0.1, beta2=0.95, clip=1.0, adam_eps=1e-8, ema=0.99,
        teacher_updates=750, teacher_lr=3e-3,
        dcd_updates=150, dcd_lr=3e-4,
        idlm_updates=350, idlm_lr=3e-4, fake_lr=1e-3, idlm_batch_size=32,
        judge_updates=450, judge_lr=3e-3),
    # One GPU, some minutes. The same text, a larger network.
    "gpu": dict(
        data="data/shakespeare.txt", tokenizer="char", block_size=256, wrap_eos=False,
        size="8x6x384", dropout=0.1, batch_size=128, micro_batch=128, save_every=1000,
        warmup=100, lr_decay=0.1, beta2=0.95, clip=1.0, adam_eps=1e-8, ema=0.999,
        teacher_updates=10_000, teacher_lr=1e-3,
        dcd_updates=2000, dcd_lr=1e-4,
        idlm_updates=1500, idlm_lr=3e-5, fake_lr=3e-4, idlm_ema=0.99,
        judge_updates=3000, judge_lr=1e-3),
    # The paper's recipe: 169M parameters, batch 512, blocks [eos] text [eos], no clipping, a rate
    # that stays as it is after warm-up. The released loss is a sum over 1,024 positions, ours their
    # mean: its eps of 1e-8 is 1e-8 / 1024 on our scale. Updates are no number of the paper's.
    "owt": dict(
        data="Skylion007/openwebtext", tokenizer="gpt2", block_size=1024, wrap_eos=True,
        size="12x12x768", dropout=0.1, batch_size=512, micro_batch=8, save_every=1000,
        warmup=2500, lr_decay=1.0, beta2=0.999, clip=math.inf, adam_eps=1e-8 / 1024, ema=0.9999,
        teacher_updates=1_000_000, teacher_lr=3e-4,
        dcd_updates=50_000, dcd_lr=6e-5,
        idlm_updates=100_000, idlm_lr=1e-6, fake_lr=1e-6,
        judge_updates=100_000, judge_lr=3e-4),
}
