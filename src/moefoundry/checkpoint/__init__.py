"""Native checkpoints: sharded, hashed, written by any mesh and read by any other.

Terms:

    tensor       has a name, the single-process model's, on every mesh, and a :class:`~.format.TensorSpec`
    box          indices of a tensor, from a first to a last in each dim (:class:`~.format.Box`)
    shard        a box of a tensor, as one rank holds it or as one place in a file stores it (:class:`~.writer.Shard`)
    file range   the bytes of a file that a shard is stored in (:class:`~.format.FileRange`)
    hash range   bytes of a file, at most 16 MiB, that have a hash of their own (:class:`~.manifest.HashRange`)
    copy         all shards of a tensor, once; the ``replicate`` axis has several
    index        the tensors of a checkpoint, and the file range of each shard
    plan         the shards that each rank writes (:data:`~.writer.SavePlan`) or reads (:class:`~.load_plan.LoadPlan`)
    to commit    to make complete files a checkpoint: index, state, manifest, marker
    to publish   to give a committed directory its final name, ``ba{batch}``

Files, from the outside in:

    run_dir, start, lease      what a run begins with, and that it is alone
    state                      all that is saved of a run
    save, writer               write it
    load, load_plan, reading   read it, on any mesh
    out_of_core, weights       read and write in one process: conversion, generation
    store, remote, fetch       which checkpoints there are, here and elsewhere
    nonfinite                  those of steps that were not finite
    manifest, format           what is in a directory, and how it is checked
    ranks                      what ranks do together
"""
