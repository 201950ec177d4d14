# Figures: one script each, from tables alone.
#
# update() keeps Snakemake from deleting an output before its job has begun: a program that fails
# leaves the figure or table that was there.


rule draw:
    input:
        tables=EXPERIMENT.tables_of_figure,
        code=code_of("workflow/plotting/draw.py", "workflow/figures/{figure}.py"),
    output:
        png=update(
            report(
                "<results>/figures/{figure}.png",
                caption="../report/figure.rst",
                category="Figures",
            )
        ),
        svg=update("<results>/figures/{figure}.svg"),
    log:
        "<results>/logs/draw/{figure}.log",
    conda:
        "../envs/cnn.yaml"
    params:
        caption=EXPERIMENT.caption,
    shell:
        "python -m workflow.plotting.draw {wildcards.figure} --tables {input.tables}"
        " --out {output.png} {output.svg} 2>&1 | tee {log}"


rule figures:
    input:
        EXPERIMENT.figure_files,


rule page:
    # The report for readers; `snakemake --report` makes another, of the workflow itself.
    input:
        figures=EXPERIMENT.figure_pictures,
        tables=EXPERIMENT.table_pages,
        provenance=EXPERIMENT.provenance,
        code=code_of("workflow/report/page.py"),
        template="workflow/report/templates/page.html.j2",
    output:
        update("<results>/report.html"),
    log:
        "<results>/logs/page.log",
    conda:
        "../envs/cnn.yaml"
    params:
        captions=EXPERIMENT.captions,
    shell:
        "python -m workflow.report.page --figures {input.figures} --tables {input.tables}"
        " --provenance {input.provenance} --out {output} 2>&1 | tee {log}"


rule poster:
    # Not part of `all`: it needs Chromium, which prints it.
    input:
        tables=EXPERIMENT.poster_tables,
        ladder=EXPERIMENT.table("ladder", "md"),
        code=code_of("workflow/report/poster.py", *EXPERIMENT.poster_sources),
        template="workflow/report/templates/poster.html.j2",
    output:
        update("<results>/poster.pdf"),
    log:
        "<results>/logs/poster.log",
    conda:
        "../envs/cnn.yaml"
    params:
        figures=EXPERIMENT.poster_figures,
    shell:
        "python -m workflow.report.poster --figures {params.figures} --tables {input.tables}"
        " --ladder {input.ladder} --out {output} 2>&1 | tee {log}"
