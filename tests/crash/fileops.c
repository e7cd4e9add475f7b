/* Sees every change that a process makes to the files below one directory.
 *
 * Preloaded, it stands before the C library's calls and hands them on as system calls. Once armed it
 * counts the changes, writes each into a log that lies elsewhere, in the order in which they happen,
 * and at the n-th of them kills the process, fails it, or writes only half of what was asked. One
 * lock is held over a change and its record: the log is the order that the disk has seen.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { MARK, OPEN, WRITE, TRUNCATE, RENAME, LINK, SYMLINK, UNLINK, MKDIR, RMDIR, FSYNC };
enum action { COUNT, KILL, TEAR, FAIL, SHORTEN };
enum { CREATED = 1, EMPTIED = 2, FORCED = 4 };
enum { HALF = -1, BLOCK = 4096 };

/* Followed by path, other path, data. Read by fileops.py. */
struct record {
    uint32_t kind, flags;
    int32_t error; /* what it failed with, FORCED or by itself; 0 where it happened */
    uint32_t path_size, other_size, unused;
    uint64_t inode, offset, data_size;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_size; /* 0: not armed */
static int log_descriptor = -1, keeps_data;
static int action, failure;
static long counted, first, times;

/* The C library's own: `syscall` is not taken over, so that what goes past us goes past it too. */
#define CALL(...) syscall(__VA_ARGS__)

static int is_below(const char *path) {
    return root_size && !strncmp(path, root, root_size) &&
           (path[root_size] == '/' || path[root_size] == 0);
}

/* The path that a descriptor has now; empty for what is no file. */
static void path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    long size = CALL(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[size > 0 ? size : 0] = 0;
}

static int is_descriptor_below(int descriptor) {
    char path[PATH_MAX];
    if (!root_size || descriptor == log_descriptor) return 0;
    path_of(descriptor, path);
    return is_below(path);
}

static int resolve(int directory, const char *name, char *path) {
    char start[PATH_MAX];
    if (!root_size || !name) return 0;
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return is_below(path);
    }
    if (directory != AT_FDCWD)
        path_of(directory, start);
    else if (!getcwd(start, sizeof start))
        return 0;
    if (snprintf(path, PATH_MAX, "%s/%s", start, name) >= PATH_MAX) return 0;
    return is_below(path);
}

static uint64_t inode_at(const char *path) {
    struct stat status;
    return fstatat(AT_FDCWD, path, &status, AT_SYMLINK_NOFOLLOW) ? 0 : status.st_ino;
}

static void die(void) {
    for (;;) CALL(SYS_kill, CALL(SYS_getpid), SIGKILL);
}

static void append(const struct iovec *pieces, int count, uint64_t size) {
    if (size && CALL(SYS_writev, log_descriptor, pieces, count) != (long)size) {
        fprintf(stderr, "fileops: cannot write the log\n");
        abort();
    }
}

static void put(struct record record, const char *path, const char *other,
                const struct iovec *data, int pieces) {
    struct iovec head[] = {{&record, sizeof record}, {(void *)path, record.path_size},
                           {(void *)other, record.other_size}};
    if (log_descriptor < 0) return;
    append(head, 3, sizeof record + record.path_size + record.other_size);
    struct iovec kept[IOV_MAX];
    uint64_t left = record.data_size;
    for (int i = 0; i < pieces; i++) {
        kept[i] = data[i];
        if (kept[i].iov_len > left) kept[i].iov_len = left;
        left -= kept[i].iov_len;
    }
    append(kept, pieces, record.data_size);
}

static void note(enum kind kind, int flags, int error, uint64_t inode, const char *path,
                 const char *other) {
    struct record record = {.kind = kind, .flags = flags, .error = error, .inode = inode,
                            .path_size = strlen(path), .other_size = other ? strlen(other) : 0};
    put(record, path, other, NULL, 0);
}

/* Takes the lock, which `end` gives back; kills if it is time to. Returns 0 where the change is to
 * happen as asked, an error number where it is to fail, HALF where half of it is to happen. */
static int begin(enum kind kind) {
    pthread_mutex_lock(&lock);
    if ((action == TEAR || action == SHORTEN) && kind != WRITE) return 0;
    long number = counted++;
    if (number < first || number - first >= times) return 0;
    switch (action) {
    case KILL:
        die();
        return 0;
    case FAIL:
        return failure;
    case TEAR:
    case SHORTEN:
        return HALF;
    default:
        return 0;
    }
}

static long end(long result) {
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

static long fail(enum kind kind, int error, const char *path) {
    note(kind, FORCED, error, 0, path, NULL);
    errno = error;
    return end(-1);
}

/* A change that failed by itself: it counts too. */
static long failed(enum kind kind, const char *path) {
    note(kind, 0, errno, 0, path, NULL);
    return end(-1);
}

/* What the tests call. */

void fileops_arm(const char *directory, const char *log, int with_data) {
    snprintf(root, sizeof root, "%s", directory);
    log_descriptor =
        CALL(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    keeps_data = with_data;
    counted = 0;
    action = COUNT;
    root_size = strlen(root);
}

void fileops_plan(int what, long at, long how_often, int error) {
    pthread_mutex_lock(&lock);
    action = what, first = at, times = how_often, failure = error, counted = 0;
    pthread_mutex_unlock(&lock);
}

void fileops_mark(const char *text) {
    pthread_mutex_lock(&lock);
    note(MARK, 0, 0, 0, text, NULL);
    pthread_mutex_unlock(&lock);
}

/* Files. */

static int open_at(int directory, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    int is_change = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
    if (!is_change || !resolve(directory, name, path))
        return CALL(SYS_openat, directory, name, flags, mode);
    int error = begin(OPEN);
    if (error) return fail(OPEN, error, path);
    int is_new = flags & O_CREAT && !inode_at(path);
    int result = CALL(SYS_openat, directory, name, flags, mode);
    if (result >= 0) {
        struct stat status;
        fstat(result, &status);
        note(OPEN, is_new ? CREATED : flags & O_TRUNC ? EMPTIED : 0, 0, status.st_ino, path, NULL);
        return end(result);
    }
    return failed(OPEN, path);
}

#define MODE_OF(flags)                      \
    mode_t mode = 0;                        \
    if ((flags) & (O_CREAT | O_TMPFILE)) {  \
        va_list arguments;                  \
        va_start(arguments, flags);         \
        mode = va_arg(arguments, mode_t);   \
        va_end(arguments);                  \
    }

int open(const char *name, int flags, ...) {
    MODE_OF(flags)
    return open_at(AT_FDCWD, name, flags, mode);
}

int open64(const char *name, int flags, ...) {
    MODE_OF(flags)
    return open_at(AT_FDCWD, name, flags, mode);
}

int openat(int directory, const char *name, int flags, ...) {
    MODE_OF(flags)
    return open_at(directory, name, flags, mode);
}

int openat64(int directory, const char *name, int flags, ...) {
    MODE_OF(flags)
    return open_at(directory, name, flags, mode);
}

int creat(const char *name, mode_t mode) {
    return open_at(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

int creat64(const char *name, mode_t mode) { return creat(name, mode); }

/* Half of what was to be written: whole blocks, if there are any, as around the page cache. */
static void cut(const struct iovec *data, int pieces, struct iovec *half) {
    size_t size = 0, left;
    for (int i = 0; i < pieces; i++) size += data[i].iov_len;
    left = size > 1 ? size / 2 : size;
    if (left > BLOCK) left -= left % BLOCK;
    for (int i = 0; i < pieces; i++) {
        half[i] = data[i];
        if (half[i].iov_len > left) half[i].iov_len = left;
        left -= half[i].iov_len;
    }
}

static ssize_t write_at(int descriptor, const struct iovec *data, int pieces, off_t offset,
                        int is_positioned) {
    struct iovec half[IOV_MAX];
    if (pieces > IOV_MAX || !is_descriptor_below(descriptor))
        return is_positioned ? CALL(SYS_pwritev, descriptor, data, pieces, offset, 0)
                             : CALL(SYS_writev, descriptor, data, pieces);
    char path[PATH_MAX];
    struct stat status;
    path_of(descriptor, path);
    int error = begin(WRITE);
    if (error > 0) return fail(WRITE, error, path);
    if (error == HALF) {
        cut(data, pieces, half);
        data = half;
    }
    fstat(descriptor, &status);
    off_t start = offset;
    if (!is_positioned)
        start = fcntl(descriptor, F_GETFL) & O_APPEND ? status.st_size
                                                      : lseek(descriptor, 0, SEEK_CUR);
    ssize_t result = is_positioned ? CALL(SYS_pwritev, descriptor, data, pieces, offset, 0)
                                   : CALL(SYS_writev, descriptor, data, pieces);
    if (result >= 0) {
        struct record record = {.kind = WRITE, .inode = status.st_ino, .offset = start,
                                .path_size = strlen(path), .data_size = keeps_data ? result : 0};
        put(record, path, NULL, data, pieces);
    }
    if (error == HALF && action == TEAR) die();
    return result < 0 ? failed(WRITE, path) : end(result);
}

ssize_t write(int descriptor, const void *buffer, size_t size) {
    return write_at(descriptor, &(struct iovec){(void *)buffer, size}, 1, 0, 0);
}

ssize_t pwrite(int descriptor, const void *buffer, size_t size, off_t offset) {
    return write_at(descriptor, &(struct iovec){(void *)buffer, size}, 1, offset, 1);
}

ssize_t pwrite64(int descriptor, const void *buffer, size_t size, off64_t offset) {
    return pwrite(descriptor, buffer, size, offset);
}

ssize_t writev(int descriptor, const struct iovec *data, int pieces) {
    return write_at(descriptor, data, pieces, 0, 0);
}

ssize_t pwritev(int descriptor, const struct iovec *data, int pieces, off_t offset) {
    return write_at(descriptor, data, pieces, offset, 1);
}

ssize_t pwritev64(int descriptor, const struct iovec *data, int pieces, off64_t offset) {
    return write_at(descriptor, data, pieces, offset, 1);
}

ssize_t pwritev2(int descriptor, const struct iovec *data, int pieces, off_t offset, int flags) {
    (void)flags;
    return write_at(descriptor, data, pieces, offset, offset != -1);
}

ssize_t pwritev64v2(int descriptor, const struct iovec *data, int pieces, off64_t offset,
                    int flags) {
    return pwritev2(descriptor, data, pieces, offset, flags);
}

int ftruncate(int descriptor, off_t size) {
    if (!is_descriptor_below(descriptor)) return CALL(SYS_ftruncate, descriptor, size);
    char path[PATH_MAX];
    struct stat status;
    path_of(descriptor, path);
    int error = begin(TRUNCATE);
    if (error) return fail(TRUNCATE, error, path);
    int result = CALL(SYS_ftruncate, descriptor, size);
    if (!result) {
        fstat(descriptor, &status);
        struct record record = {.kind = TRUNCATE, .inode = status.st_ino, .offset = size,
                                .path_size = strlen(path)};
        put(record, path, NULL, NULL, 0);
    }
    return result ? failed(TRUNCATE, path) : end(result);
}

int ftruncate64(int descriptor, off64_t size) { return ftruncate(descriptor, size); }

static int sync_with(long call, int descriptor) {
    if (!is_descriptor_below(descriptor)) return CALL(call, descriptor);
    char path[PATH_MAX];
    struct stat status;
    path_of(descriptor, path);
    int error = begin(FSYNC);
    if (error) return fail(FSYNC, error, path);
    int result = CALL(call, descriptor);
    if (!result) {
        fstat(descriptor, &status);
        note(FSYNC, 0, 0, status.st_ino, path, NULL);
    }
    return result ? failed(FSYNC, path) : end(result);
}

int fsync(int descriptor) { return sync_with(SYS_fsync, descriptor); }

int fdatasync(int descriptor) { return sync_with(SYS_fdatasync, descriptor); }

/* Names. */

int mkdirat(int directory, const char *name, mode_t mode) {
    char path[PATH_MAX];
    if (!resolve(directory, name, path)) return CALL(SYS_mkdirat, directory, name, mode);
    int error = begin(MKDIR);
    if (error) return fail(MKDIR, error, path);
    int result = CALL(SYS_mkdirat, directory, name, mode);
    if (!result) note(MKDIR, 0, 0, inode_at(path), path, NULL);
    return result ? failed(MKDIR, path) : end(result);
}

int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int unlinkat(int directory, const char *name, int flags) {
    char path[PATH_MAX];
    if (!resolve(directory, name, path)) return CALL(SYS_unlinkat, directory, name, flags);
    enum kind kind = flags & AT_REMOVEDIR ? RMDIR : UNLINK;
    int error = begin(kind);
    if (error) return fail(kind, error, path);
    int result = CALL(SYS_unlinkat, directory, name, flags);
    if (!result) note(kind, 0, 0, 0, path, NULL);
    return result ? failed(kind, path) : end(result);
}

int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }

int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int renameat2(int from, const char *name, int to, const char *other, unsigned flags) {
    char path[PATH_MAX], target[PATH_MAX];
    int is_from = resolve(from, name, path), is_to = resolve(to, other, target);
    if (!is_from && !is_to) return CALL(SYS_renameat2, from, name, to, other, flags);
    int error = begin(RENAME);
    if (error) return fail(RENAME, error, path);
    int result = CALL(SYS_renameat2, from, name, to, other, flags);
    if (!result) note(RENAME, flags, 0, 0, path, target);
    return result ? failed(RENAME, path) : end(result);
}

int renameat(int from, const char *name, int to, const char *other) {
    return renameat2(from, name, to, other, 0);
}

int rename(const char *name, const char *other) {
    return renameat2(AT_FDCWD, name, AT_FDCWD, other, 0);
}

int linkat(int from, const char *name, int to, const char *other, int flags) {
    char path[PATH_MAX], target[PATH_MAX];
    resolve(from, name, path);
    if (!resolve(to, other, target)) return CALL(SYS_linkat, from, name, to, other, flags);
    int error = begin(LINK);
    if (error) return fail(LINK, error, target);
    int result = CALL(SYS_linkat, from, name, to, other, flags);
    if (!result) note(LINK, 0, 0, inode_at(target), path, target);
    return result ? failed(LINK, target) : end(result);
}

int link(const char *name, const char *other) {
    return linkat(AT_FDCWD, name, AT_FDCWD, other, 0);
}

int symlinkat(const char *text, int to, const char *other) {
    char target[PATH_MAX];
    if (!resolve(to, other, target)) return CALL(SYS_symlinkat, text, to, other);
    int error = begin(SYMLINK);
    if (error) return fail(SYMLINK, error, target);
    int result = CALL(SYS_symlinkat, text, to, other);
    if (!result) note(SYMLINK, 0, 0, 0, text, target);
    return result ? failed(SYMLINK, target) : end(result);
}

int symlink(const char *text, const char *other) { return symlinkat(text, AT_FDCWD, other); }
