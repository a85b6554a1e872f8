import platform

from mmdet3d.utils.allocator import keep_freed_memory


def test_the_c_library_is_told_where_it_can_be():
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    assert keep_freed_memory() == keep_freed_memory()
