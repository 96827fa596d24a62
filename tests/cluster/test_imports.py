"""What the processes of a run do not import, since each start waits for it."""

import subprocess
import sys
import textwrap

COMPILER = "torch._dynamo.convert_frame"
# What a worker does with its imports: a process group, an optimiser and a step.
STEP = """
    import cluster.worker, torch
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def run(program: str, module: str) -> str:
    """What a new process prints, and whether it has imported a module."""
    program = f"import sys\n{textwrap.dedent(program)}\nprint({module!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_worker_does_not_import_torchs_compiler():
    assert run(STEP, COMPILER) == "False\n"


def test_who_compiles_gets_the_compiler():
    compile_something = """
    import torch._dynamo
    print(torch._dynamo.config.suppress_errors)
    def backend(graph, examples):
        print("compiled")
        return graph.forward
    print(torch.compile(lambda x: 2 * x, backend=backend)(torch.ones(2)).tolist())
"""
    assert run(STEP + compile_something, COMPILER) == "False\ncompiled\n[2.0, 2.0]\nTrue\n"


def test_the_driver_of_a_trial_does_not_import_torch():
    assert run("import cluster.sweep_trainables", "torch") == "False\n"


def test_an_export_does_not_import_ray():
    assert run("import jobs.export", "ray") == "False\n"
