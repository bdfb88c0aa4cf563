"""Make tests/kaggle.ipynb, README's Kaggle cells and some more, with the scripts: python tests/make_notebook.py

What is not in README is commented out. A test executes the file and compares it with what this command would write
now.
"""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "tests" / "kaggle.ipynb"
SCRIPTS = ("data", "train", "evaluate", "prompt_baseline")
OPTIONAL = (  # training in the kernel, a checkpoint of an earlier session, two GPUs
    """from train import main

for seed in ("1", "2"):
    main([*OPTIONS.split(), "--seed", seed, "--output_dir", f"seed-{seed}"])""",
    """import evaluate

evaluate.main(["--ckpt", "/kaggle/input/my-run/out"])""",
    "!accelerate launch --multi_gpu --num_processes 2 train.py $OPTIONS --output_dir two",
)
TITLE = "# Human or ChatGPT? Fine-tune Qwen1.5 with LoRA\nTurn on a GPU (T4) and the internet, then run all cells."


def readme_cells():
    section = re.search(r"^## Kaggle and Jupyter$(.*?)^## ", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)[1]
    return re.findall(r"^```python\n(.*?)\n```$", section, re.M | re.S)


def notebook():
    """The notebook as a dict; each script is a %%writefile cell, in place of README's one cell for all four."""
    sources = []
    for cell in readme_cells():
        if cell.startswith("%%writefile"):
            texts = [(ROOT / f"{script}.py").read_text(encoding="utf-8").rstrip("\n") for script in SCRIPTS]
            sources += [f"%%writefile {script}.py\n{text}" for script, text in zip(SCRIPTS, texts, strict=True)]
        else:
            sources.append(cell)
    for cell in OPTIONAL:
        sources.append("\n".join(f"# {line}".rstrip() for line in ["Optional:", *cell.split("\n")]))
    cells = [nbformat.v4.new_markdown_cell(TITLE), *map(nbformat.v4.new_code_cell, sources)]
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"  # else random, so that no two files would be equal
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=kernel)


if __name__ == "__main__":
    nbformat.write(notebook(), NOTEBOOK)
    print(f"written to {NOTEBOOK}")
