# Data sets: from a mirror or a folder, checked, into one file each.


rule settings:
    # The whole experiment as it was asked for: config files merged, checked, defaults filled in.
    output:
        "<results>/config.yaml",
    log:
        "<results>/logs/settings.log",
    localrule: True
    params:
        settings=EXPERIMENT.settings_text,
    run:
        write_text(output[0], params.settings)


rule download:
    input:
        settings=ancient("<results>/config.yaml"),
    output:
        touch("<results>/data/{dataset}/.downloaded"),
    log:
        "<results>/logs/download/{dataset}.log",
    localrule: True
    conda:
        "../envs/cnn.yaml"
    params:
        # What the files are; another list of mirrors is no reason to fetch them again.
        files=EXPERIMENT.dataset_files,
        folder=subpath(output[0], parent=True),
    shell:
        "python -m cnnlib download --config {input.settings} --dataset {wildcards.dataset}"
        " --folder {params.folder}"


rule prepare:
    input:
        settings=ancient("<results>/config.yaml"),
        downloaded="<results>/data/{dataset}/.downloaded",
        code=multiext("cnnlib/datasets/", "idx.py", "store.py", "synthetic.py"),
    output:
        "<results>/data/{dataset}.npz",
    log:
        "<results>/logs/prepare/{dataset}.log",
    conda:
        "../envs/cnn.yaml"
    params:
        spec=EXPERIMENT.dataset_settings,
        folder=subpath(input.downloaded, parent=True),
    shell:
        "python -m cnnlib prepare --config {input.settings} --dataset {wildcards.dataset}"
        " --folder {params.folder} --out {output} 2>&1 | tee {log}"
