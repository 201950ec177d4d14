# Figures: one script each, from tables alone.


rule draw:
    input:
        tables=EXPERIMENT.tables_of_figure,
        code=[
            "workflow/figures/{figure}.py",
            *multiext(
                "workflow/",
                "draw.py",
                "panels.py",
                "recognition.py",
                "style.py",
                "wording.py",
            ),
        ],
    output:
        png=report(
            "<results>/figures/{figure}.png",
            caption="../report/figure.rst",
            category="Figures",
        ),
        svg="<results>/figures/{figure}.svg",
    log:
        "<results>/logs/draw/{figure}.log",
    conda:
        "../envs/cnn.yaml"
    params:
        caption=EXPERIMENT.caption,
    shell:
        "python -m workflow.draw {wildcards.figure} --tables {input.tables}"
        " --out {output.png} {output.svg} 2>&1 | tee {log}"


rule figures:
    input:
        EXPERIMENT.figure_files,
