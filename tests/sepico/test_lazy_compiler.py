"""torch's compiler stays out of processes that compile nothing, and is there for who compiles."""

import subprocess
import sys
import textwrap

import pytest


def run(program: str) -> str:
    """What a new process prints, and whether it has imported the compiler."""
    asked = "print('sympy' in sys.modules)"
    program = f"import sys\n{textwrap.dedent(program)}\n{asked}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def step() -> str:
    """What a worker does with its imports: a process group, an optimiser and a step."""
    return """
        import cluster.worker, torch
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([weight])
        weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    """


def test_a_worker_does_not_import_the_compiler(step):
    assert run(step) == "False\n"


def test_who_compiles_gets_the_compiler(step):
    compile_something = """
        import torch._dynamo
        print(torch._dynamo.config.suppress_errors)
        def backend(graph, examples):
            print("compiled")
            return graph.forward
        print(torch.compile(lambda x: 2 * x, backend=backend)(torch.ones(2)).tolist())
    """
    assert run(step + compile_something) == "False\ncompiled\n[2.0, 2.0]\nTrue\n"
