import psutil

from megaroute.parallel.dims import ParallelDims


def test_bringing_groups_up_again_leaves_no_thread_of_the_old_ones(one_process):
    from megaroute.parallel import groups

    groups.bring_up(ParallelDims(1, 1, 1), seed=1)
    before = psutil.Process().num_threads()
    for _ in range(3):
        groups.bring_up(ParallelDims(1, 1, 1), seed=1)
    assert psutil.Process().num_threads() <= before + 2
