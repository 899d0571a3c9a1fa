"""Measurements, ``lingen bench ...``: every number that README states comes from here. Beside them yardsticks, what
lingen is measured against. Nothing here is something that lingen itself runs on.

- `commands`, `model_commands`: the command line.
- `scaling`, `receipt`, `exponent`: ``lingen bench scaling``, how cost grows with the tokens; `model`: the denoiser;
  `autoencoder`: ``lingen bench tae``. They use `place`, `build`, `timing`, `parts`.
- `fit`: ``lingen bench fit``, a recipe's own training loop by part.
- `results`: the result files. `show`, `tables`, `plots`: what is printed of them, over the numbers of `paper`.

- `stock`: MATE's branches wired from stock parts (mamba_ssm's scan, torch's conv1d and SDPA), on the weights of ours.
- `plain`: the whole denoiser in plain PyTorch, made of these.
- `training`: ``lingen bench training``, layers of ours and plain blocks, forward and backward.
- `branches`: ``lingen bench stock``, ours and stock branches without their projections.
- `kernels`: ``lingen bench kernels``, each kernel against its plain twin and stock form, one by one, over `cases`.
- `targets`: ``lingen bench show``, what of the paper and of these is to be reached, and whether it is.
- `twins`: ``lingen bench model --twins``, a DiT of equal size and LinGen of stock parts.
- `loader`: ``lingen bench loader``, lingen's loader on raw, encoded and remote shards, measured in `pairs` beside its
  `rivals`: a bare PyAV loop and plain webdataset; beside them the cost of an index of very many samples, `index_scale`.
- `selftest`, `coverage`, `eval_commands`: ``lingen eval selftest``, which metric sees which damage, and what intervals
  cover; `vbench`: ``lingen eval vbench``.
- `theatre`: judges of the emoji theatre and the score of its model, run as a module; `theatre_gpu.sh` trains both.
- `loopback`: a web server on this machine, a stand-in for remote shards.

`lingen.cli.bench.yardstick` loads them by their place beside the package; an installed wheel does not hold them.
Tests hold each of them to computing what lingen computes, else its speed would say nothing
(`tests/test_bench_stock.py`, `tests/test_bench_loader.py`).
"""
