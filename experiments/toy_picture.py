# SPDX-License-Identifier: MIT
"""The picture that toy.py draws."""
import matplotlib
from matplotlib.figure import Figure


def draw_picture(results, p, path):
    """results: {process: toy.run(...)}; p: the data's law, (K, K). A row for each process, one for
    what fails."""
    p = p.numpy()
    rows = []
    failing = [None]
    for models in results.values():
        rows.append([(p, None)] + models[:4])
        failing += models[4:]
    matplotlib.rcParams |= {"font.size": 13, "axes.titlesize": 13}
    figure = Figure((8.3, 7.3), layout="constrained")
    axes = figure.subplots(3, 5)
    for row, panels in enumerate([*rows, failing]):
        for axis, panel in zip(axes[row], panels):
            axis.set(xticks=[], yticks=[])
            if panel is None:
                axis.axis("off")
                axis.text(0, 0.4, "What fails\nin one pass")
                continue
            P, record = panel
            axis.imshow(P.T ** 0.5, origin="lower", cmap="magma", vmin=0, vmax=p.max() ** 0.5)
            title, label = "data", "p*"
            if record:
                title = "{model}\n{passes} pass".format(**record) + "es" * (record["passes"] > 1)
                label = "valid {validity:.1%}\nJS {js:.3f}".format(**record)
            if row == 2:
                title = "{process}\n{model}".format(**record)
            axis.set_title("" if row == 1 else title)
            axis.set_xlabel(label)
        axes[row, 0].set_ylabel([*results, ""][row])
    figure.savefig(path, dpi=150)
