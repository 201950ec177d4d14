# Tables: the raw rows of all runs, then what is made of them.

# Where tables lie without runs (results/reference/*), they are given: nothing is measured again.
if not EXPERIMENT.tables_are_given:

    rule combine:
        input:
            EXPERIMENT.run_files,
        output:
            update("<results>/tables/{raw}.csv"),
        log:
            "<results>/logs/combine/{raw}.log",
        conda:
            "../envs/cnn.yaml"
        params:
            # The names of thousands of files go through a file, not through the command line.
            list=EXPERIMENT.list_file,
        shell:
            "python -m cnnlib combine --table {wildcards.raw} --out {output} --list {params.list}"
            " 2>&1 | tee {log}"


rule tabulate:
    input:
        tables=EXPERIMENT.tables_of_table,
        code=code_of("workflow/glue/tabulate.py", "workflow/tables/{table}.py"),
    output:
        csv=update("<results>/tables/{table}.csv"),
        markdown=update("<results>/tables/{table}.md"),
    log:
        "<results>/logs/tabulate/{table}.log",
    conda:
        "../envs/cnn.yaml"
    shell:
        "python -m workflow.glue.tabulate {wildcards.table} --tables {input.tables}"
        " --csv {output.csv} --markdown {output.markdown} 2>&1 | tee {log}"


rule tables:
    input:
        EXPERIMENT.table_files,
