# Figures: one script each, from tables alone. The report and the poster show them.
#
# update() keeps Snakemake from deleting an output before its job has begun: a program that fails
# leaves the figure or table that was there.


rule draw:
    input:
        tables=lambda wildcards: collect(
            "<results>/tables/{name}.csv",
            name=EXPERIMENT.tables_read("figures", wildcards.figure),
        ),
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
        own_stages=EXPERIMENT.own_stages,
    shell:
        "python -m workflow.plotting.draw {wildcards.figure} --tables {input.tables}"
        " --out {output.png} {output.svg} 2>&1 | tee {log}"


rule figures:
    input:
        collect(
            "<results>/figures/{figure}.{kind}",
            figure=EXPERIMENT.wanted_figures,
            kind=["png", "svg"],
        ),


rule page:
    # The report for readers; `snakemake --report` makes another, of the workflow itself.
    input:
        figures=EXPERIMENT.page_figures,
        tables=collect("<results>/tables/{table}.md", table=EXPERIMENT.wanted_tables),
        data=collect("<results>/tables/{table}.csv", table=EXPERIMENT.page_tables),
        published=EXPERIMENT.published,
        provenance=EXPERIMENT.provenance,
        code=code_of(
            "workflow/report/page.py",
            "workflow/tables/limits.py",
            "workflow/tables/hotspots.py",
        ),
        parts=page_parts(),
    output:
        update("<results>/report.html"),
    log:
        "<results>/logs/page.log",
    conda:
        "../envs/cnn.yaml"
    params:
        captions=EXPERIMENT.captions,
        own_stages=EXPERIMENT.own_stages,
        published=lambda wildcards: PUBLISHED,
    shell:
        "python -m workflow.report.page --figures {input.figures} --tables {input.tables}"
        " --data {input.data} --provenance {input.provenance} --published {params.published}"
        " --out {output} 2>&1 | tee {log}"


rule poster:
    # Not part of `all`: it needs Chromium, which prints it.
    input:
        tables=collect("<results>/tables/{name}.csv", name=EXPERIMENT.poster_tables),
        code=code_of(
            "workflow/report/poster.py",
            *collect("workflow/figures/{figure}.py", figure=EXPERIMENT.poster_figures),
        ),
        template="workflow/report/templates/poster.html.j2",
    output:
        update("<results>/poster.pdf"),
    log:
        "<results>/logs/poster.log",
    conda:
        "../envs/cnn.yaml"
    params:
        figures=EXPERIMENT.poster_figures,
        address=EXPERIMENT.config.address or "",
    shell:
        "python -m workflow.report.poster --figures {params.figures} --tables {input.tables}"
        " --address={params.address:q} --out {output} 2>&1 | tee {log}"
