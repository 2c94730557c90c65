/*
 * The least that a FUSE daemon can do: every answer is a constant. What a file system on it costs is what one round trip
 * between kernel and daemon costs on this machine, and no daemon is faster. See scripts/roundtrip.py.
 *
 * usage: roundtrip MOUNTPOINT [spin]
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

static char request[1 << 20], reply[1 << 16];

static void describe(struct fuse_attr *attr, unsigned long ino, int mode)
{
    attr->ino = ino;
    attr->mode = mode;
    attr->nlink = 1;
    attr->size = 2000;
}

/* Fill in the answer to `header`, whose struct is at `body`; returns its length, or a negative errno. */
static long answer(const struct fuse_in_header *header, const void *body, void *out)
{
    static unsigned long next = 2;

    switch (header->opcode) {
    case FUSE_INIT: {
        const struct fuse_init_in *in = body;
        struct fuse_init_out *init = out;
        init->major = FUSE_KERNEL_VERSION;
        init->minor = 31;
        init->max_readahead = in->max_readahead;
        init->max_write = 128 * 1024;
        init->flags = FUSE_NO_OPEN_SUPPORT | FUSE_NO_OPENDIR_SUPPORT | FUSE_PARALLEL_DIROPS | FUSE_BIG_WRITES;
        return sizeof *init;
    }
    case FUSE_LOOKUP: { /* names that begin with n are not there */
        struct fuse_entry_out *entry = out;
        if (*(const char *)body != 'n') {
            entry->nodeid = next++;
            entry->entry_valid = entry->attr_valid = 3600;
            describe(&entry->attr, entry->nodeid, 0100644);
        }
        return sizeof *entry;
    }
    case FUSE_GETATTR: {
        struct fuse_attr_out *attr = out;
        attr->attr_valid = 3600;
        describe(&attr->attr, header->nodeid, header->nodeid == FUSE_ROOT_ID ? 040755 : 0100644);
        return sizeof *attr;
    }
    case FUSE_READ:
        return 2000;
    default:
        return -ENOSYS;
    }
}

int main(int argc, char **argv)
{
    int fd = open("/dev/fuse", O_RDWR | O_NONBLOCK), spin = argc > 2;
    struct pollfd wait = {fd, POLLIN, 0};
    char options[128];

    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions", fd);
    if (argc < 2 || mount("roundtrip", argv[1], "fuse.roundtrip", MS_NOSUID | MS_NODEV, options)) {
        perror("roundtrip");
        return 1;
    }
    for (;;) {
        const struct fuse_in_header *header = (void *)request;
        struct fuse_out_header *head = (void *)reply;
        ssize_t size = read(fd, request, sizeof request);
        if (size < 0 && errno == ENODEV)
            return 0; /* unmounted */
        if (size < 0) {
            if (errno == EAGAIN && !spin)
                poll(&wait, 1, -1);
            continue;
        }
        if (header->opcode == FUSE_FORGET || header->opcode == FUSE_BATCH_FORGET || header->opcode == FUSE_INTERRUPT)
            continue;
        memset(reply, 0, 512);
        long length = answer(header, request + sizeof *header, reply + sizeof *head);
        head->unique = header->unique;
        head->error = length < 0 ? length : 0;
        head->len = sizeof *head + (length < 0 ? 0 : length);
        if (write(fd, reply, head->len) < 0 && errno != ENOENT)
            perror("roundtrip: write");
    }
}
