// Wrappers around the C library's functions that write files, one of which fails on request.
//
// Loaded with LD_PRELOAD. Only operations on paths below a folder count.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long number, fail_at;
static int fail_with, fail_always, log_file = -1;

void fault(const char *below, long at, int error, int always, const char *log) {
    log_file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    number = 0, fail_at = at, fail_with = error, fail_always = always;
    strncpy(folder, below, sizeof folder - 1);
}

// Return whether the operation is to fail; count it if its path is below the folder.
static int fails(const char *operation, const char *path) {
    char absolute[2 * PATH_MAX], line[2 * PATH_MAX + 64];
    if (!folder[0]) return 0;
    if (path[0] != '/') {
        if (!getcwd(absolute, PATH_MAX)) return 0;
        strcat(absolute, "/");
        strncat(absolute, path, PATH_MAX - 1);
        path = absolute;
    }
    if (strncmp(path, folder, strlen(folder))) return 0;
    int length = snprintf(line, sizeof line, "%s %s\n", operation, path + strlen(folder));
    syscall(SYS_write, log_file, line, length);
    long own = __atomic_fetch_add(&number, 1, __ATOMIC_SEQ_CST);
    if (own != fail_at && !(fail_always && own > fail_at)) return 0;
    errno = fail_with;
    return 1;
}

static int fails_on(const char *operation, int file) {
    char link[64], path[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return fails(operation, path);
}

#define ORIGINAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name)                                                                           \
    int name(const char *path, int flags, ...) {                                             \
        va_list more;                                                                        \
        va_start(more, flags);                                                               \
        mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;                            \
        va_end(more);                                                                        \
        if ((flags & O_ACCMODE) != O_RDONLY && fails("open", path)) return -1;               \
        return ORIGINAL(name)(path, flags, mode);                                            \
    }
#define OPENAT(name)                                                                         \
    int name(int place, const char *path, int flags, ...) {                                  \
        va_list more;                                                                        \
        va_start(more, flags);                                                               \
        mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;                            \
        va_end(more);                                                                        \
        if ((flags & O_ACCMODE) != O_RDONLY && fails("open", path)) return -1;               \
        return ORIGINAL(name)(place, path, flags, mode);                                     \
    }
#define SYNC(name) \
    int name(int file) { return fails_on("sync", file) ? -1 : ORIGINAL(name)(file); }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
SYNC(fsync)
SYNC(fdatasync)

ssize_t write(int file, const void *bytes, size_t size) {
    return fails_on("write", file) ? -1 : ORIGINAL(write)(file, bytes, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    return fails_on("write", file) ? -1 : ORIGINAL(writev)(file, parts, count);
}

int rename(const char *from, const char *to) { return fails("rename", to) ? -1 : ORIGINAL(rename)(from, to); }

int mkdir(const char *path, mode_t mode) { return fails("mkdir", path) ? -1 : ORIGINAL(mkdir)(path, mode); }
