"""The fast KRR loss in a training loop of your own: synthetic points learned by gradient descent.

python examples/krr_in_your_loop.py [--steps 200]
"""

import argparse

import torch

from krrst_fast import krr_mse

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

draw = torch.Generator().manual_seed(0)
f_real = torch.randn(512, 32, generator=draw)
y_real = torch.tanh(f_real @ torch.randn(32, 4, generator=draw))

f_syn = torch.randn(16, 32, generator=draw, requires_grad=True)
y_syn = torch.zeros(16, 4, requires_grad=True)
optimizer = torch.optim.Adam([f_syn, y_syn], lr=0.05)
for step in range(args.steps):
    loss = krr_mse(f_syn, y_syn, f_real, y_real, ridge=1e-3, bias=1.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 0:
        print(f"first loss {loss.item():.4f}")
print(f"last loss {loss.item():.4f}")
