"""Puts the repository's root on the path, and holds the helpers that several test files share."""
import importlib
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"         # so small, two would wait; and children compute alike

import pytest                                                        # noqa: E402
import torch                                                         # noqa: E402

# A job of a shell in the background ignores Ctrl-C, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint                                                    # noqa: E402
from data import BadInput                                            # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def nothing_twice():
    """What one run does not notice and hundreds of short ones do: the clock of each K is computed
    once, and a seed formats no stack for a GPU that is not there."""
    import gaussian
    exact = gaussian.gamma_of_alpha
    known = {}

    def remembered(alpha, K):
        key = (K, *alpha.tolist())
        if key not in known:
            known[key] = exact(alpha, K)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussian, "gamma_of_alpha", remembered)
        for device in torch.cuda, torch.xpu, torch.mtia:
            if not device.is_available():
                patch.setattr(device, "manual_seed_all", lambda seed: None, raising=False)
        yield


@pytest.fixture
def rng():
    """A seeded CPU generator; every draw of a test comes from one."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def float64():
    """New tensors, networks and uniform numbers are float64, so that 1e-10 is a fair bar."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- networks -----------------------------------------------------------------------------------

def random_dit(V, rng, **config):
    """A small DiT in float64 with every parameter random: a new one predicts the flat law."""
    from model import DiT, ModelConfig
    config = {"num_layers": 2, "num_heads": 2, "width": 16, "cond_dim": 8, **config}
    net = DiT(ModelConfig(V, **config)).double()
    for p in net.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return net


class Fixed:
    """A network of given logits (B, L, >= K), whatever it reads."""

    def __init__(self, logits):
        self.logits = logits

    def hidden(self, x, sigma):
        return self.logits

    def project(self, rows):
        return rows


class Recorded:
    """A network that remembers what it read (x, sigma) and the hidden states it gave."""

    def __init__(self, net):
        self.net = net
        self.project = net.project
        self.seen = []
        self.hidden_states = []

    def hidden(self, x, sigma):
        self.seen.append((x, sigma))
        self.hidden_states.append(self.net.hidden(x, sigma))
        return self.hidden_states[-1]


# ---- comparisons --------------------------------------------------------------------------------

def gradients(loss, net):
    """The gradient in every parameter; zeros where there is none."""
    parameters = list(net.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters)]


def assert_same(found, exact, bound=1e-10):
    """Every tensor within `bound` of its exact one, relative to the latter's largest entry."""
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= bound * b.abs().max().clamp(min=1e-12)


def assert_law(tokens, law):
    """Pearson's chi-square of draws against a law over 0 ... n - 1; bins below 10 are merged.

    (chi2 / df)^(1/3) is close to normal (Wilson and Hilferty: mean 1 - 2 / (9 df), variance
    2 / (9 df)). The alarm at 4.5 standard deviations has odds below 1e-5 for any df.
    """
    assert law_score(tokens, law) < 4.5


def law_score(tokens, law):
    """How many standard deviations the draws are from the law; infinite for a token of mass 0."""
    counts = torch.bincount(tokens.flatten(), minlength=len(law)).double()
    expected = law.double() * counts.sum()
    assert abs(law.sum() - 1) < 1e-9
    if counts[expected == 0].sum() > 0:
        return math.inf
    is_rare = expected < 10
    counts = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]])
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
    if expected[-1] < 10:
        counts = counts[:-1]
        expected = expected[:-1]
    df = len(expected) - 1
    assert df >= 1, "nothing to test"
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    return ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


# ---- short runs of train.py and sample.py -------------------------------------------------------

# Dropout and accumulation are on and steps are large: what goes wrong in them shows in the weights.
TINY = dict(
    data="text.txt", tokenizer="char", block_size=16, size="1x2x16", dropout=0.1, wrap_eos=False,
    batch_size=8, micro_batch=4, warmup=2, lr_decay=0.1, beta2=0.95, clip=1.0, adam_eps=1e-8,
    save_every=3, fake_lr=2e-2,
    teacher_updates=4, teacher_lr=1e-2, teacher_ema=0.9, dcd_updates=4, dcd_lr=1e-2, dcd_ema=0.9,
    idlm_updates=4, idlm_lr=1e-2, idlm_ema=0.9, judge_updates=4, judge_lr=1e-2, judge_ema=0.9)


def some_text(num_words=800):
    words = "the king and queen of a land went to see one good man in his old red house".split()
    drawn = torch.randint(len(words), (num_words,), generator=seeded(0))
    return " ".join(words[i] for i in drawn)


def tiny_flags(flags=""):
    return ["--preset=tiny", "--no-compile", "--dtype=float32", "--device=cpu", *flags.split()]


def run_train(flags=""):
    """train.py in this process: a run of some updates, of the preset `tiny`."""
    import train
    train.main(tiny_flags(flags))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An empty working folder with a text of some kB, and the preset `tiny`. -> the folder"""
    import train
    (tmp_path / "text.txt").write_text(some_text(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.PRESETS, "tiny", dict(TINY))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    precision = torch.get_float32_matmul_precision()
    yield tmp_path
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which both processes have run all their stages. Read it; do not write to it."""
    import train
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(some_text(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(train.PRESETS, "tiny", dict(TINY))
        for process, stages in train.STAGES.items():
            for stage in stages:
                run_train(f"--process {process} --stage {stage}")
    return folder


@pytest.fixture
def blind(monkeypatch):
    """A save measures nothing and writes no text, which takes longer than an update."""
    import run
    monkeypatch.setattr(run.Run, "show", lambda self, step: None)


@pytest.fixture
def runs(tiny, trained):
    """A working folder with a copy of the finished runs: out/mdlm and out/duo. -> the folder"""
    shutil.copytree(trained / "out", tiny / "out")
    return tiny


# ---- scripts in processes of their own ----------------------------------------------------------

def run_script_in_child(script, argv, folder, env, output):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import train
    os.chdir(folder)
    os.environ.update(env)
    for fd in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.stdout = open(1, "w", encoding="utf-8")            # not what pytest captures
    sys.stderr = open(2, "w", encoding="utf-8")
    torch.set_num_threads(1)
    sys.argv = [f"{script}.py", *argv]
    train.PRESETS["tiny"] = dict(TINY)
    checkpoint.run_script(importlib.import_module(script).main)


def serve(pipe, other_end):
    """Fork scripts, and wait for them, until the pipe closes."""
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in "torch._dynamo", "train", "sample", "toy":
        importlib.import_module(name)       # once, not in every child
    children = []
    while True:
        try:
            number, task = pipe.recv()
        except EOFError:
            return
        if number is None:
            children.append(FORK.Process(target=run_script_in_child, args=task))
            children[-1].start()
            pipe.send((len(children) - 1, children[-1].pid))
        else:
            children[number].join(task)
            pipe.send(children[number].exitcode)


class Child:
    """A script in a process that can be killed."""

    def __init__(self, server, script, argv, folder, env, output):
        self.server = server
        self.output = output
        self.number, self.pid = self.ask(None, (script, argv, folder, env, output))

    def ask(self, number, task):
        self.server.send((number, task))
        return self.server.recv()

    def wait(self, seconds=60):
        """-> exit status (minus a signal's number), everything that was printed"""
        return self.ask(self.number, seconds), self.printed()

    def printed(self):
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""

    def wait_for(self, text, seconds=60):
        """Until the script has printed this."""
        end = time.time() + seconds
        while text not in self.printed():
            assert self.wait(0)[0] is None and time.time() < end, self.printed()
            time.sleep(0.005)

    def send(self, signal_number):
        os.kill(self.pid, signal_number)
        return self.wait()


FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="session", autouse=True)
def server():
    """A process that forks scripts: it has imported torch, so one costs 0.1 s, not 4. It starts
    before any backward pass, after which torch cannot be forked."""
    pipe, other_end = FORK.Pipe()
    process = FORK.Process(target=serve, args=(other_end, pipe))
    process.start()
    other_end.close()
    yield pipe
    pipe.close()
    process.join()


@pytest.fixture
def start(tmp_path, server):
    """start("train", flags, RANK="1", ...) -> Child"""
    children = []

    def start_script(script, flags, **env):
        argv = tiny_flags(flags) if script == "train" else flags.split()
        output = tmp_path / f"printed-{len(children)}"
        children.append(Child(server, script, argv, os.getcwd(), env, output))
        return children[-1]

    yield start_script
    for child in children:
        if child.wait(0)[0] is None:
            child.send(signal.SIGKILL)


# ---- refusals -----------------------------------------------------------------------------------

def refused(call, *words):
    """call() raises BadInput: one line that holds these words. -> the line"""
    with pytest.raises(BadInput) as failure:
        call()
    line = str(failure.value)
    assert "\n" not in line and all(word in line for word in words), line
    return line


def contents(folder):
    """{file: its bytes} of everything below a folder, locks and lines of progress left out."""
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and not path.name.startswith(".lock")}
