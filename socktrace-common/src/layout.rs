//! The kernel fields and counters that the programs read.
//!
//! One line a field. The eBPF side turns each into a read-only global of that name, the loader finds
//! the offset in the running kernel's BTF and writes it there before the programs are verified. A
//! `bits` field counts in bits, the others in bytes. [`ABSENT`] stands for a field that this kernel
//! does not have; `required` fields are never absent when a program runs.

/// Offset of a field that the running kernel lacks.
pub const ABSENT: u32 = u32::MAX;

/// Calls `$then! { NAME "type" "member.path" need unit; ... }` with every field.
#[macro_export]
macro_rules! for_each_field {
    ($then:ident) => {
        $then! {
            SK_FAMILY "sock" "__sk_common.skc_family" required bytes;
            SK_STATE "sock" "__sk_common.skc_state" required bytes;
            SK_NUM "sock" "__sk_common.skc_num" required bytes;
            SK_RCV_SADDR "sock" "__sk_common.skc_rcv_saddr" required bytes;
            SK_V6_RCV_SADDR "sock" "__sk_common.skc_v6_rcv_saddr" optional bytes;
            SK_NET "sock" "__sk_common.skc_net.net" required bytes;
            SK_DADDR "sock" "__sk_common.skc_daddr" required bytes;
            SK_DPORT "sock" "__sk_common.skc_dport" required bytes;
            SK_V6_DADDR "sock" "__sk_common.skc_v6_daddr" optional bytes;
            SK_COOKIE "sock" "__sk_common.skc_cookie" required bytes;
            SK_REUSEPORT "sock" "__sk_common.skc_reuseport" required bits;
            SK_IPV6ONLY "sock" "__sk_common.skc_ipv6only" required bits;
            SK_BOUND_IF "sock" "__sk_common.skc_bound_dev_if" required bytes;
            SK_ACK_BACKLOG "sock" "sk_ack_backlog" required bytes;
            SK_MAX_ACK_BACKLOG "sock" "sk_max_ack_backlog" required bytes;
            SK_PROTOCOL "sock" "sk_protocol" required bytes;
            SK_TYPE "sock" "sk_type" required bytes;
            SK_ERR "sock" "sk_err" required bytes;
            SK_RECEIVE_QUEUE "sock" "sk_receive_queue" required bytes;
            SK_RECEIVE_LEN "sock" "sk_receive_queue.qlen" required bytes;
            SK_SOCKET "sock" "sk_socket" required bytes;
            SK_SHUTDOWN "sock" "sk_shutdown" required bytes;
            SK_UID "sock" "sk_uid.val" required bytes;
            ICSK_QLEN "inet_connection_sock" "icsk_accept_queue.qlen" required bytes;
            ICSK_YOUNG "inet_connection_sock" "icsk_accept_queue.young" required bytes;
            ICSK_ACCEPT_HEAD "inet_connection_sock" "icsk_accept_queue.rskq_accept_head" required bytes;
            ICSK_DEFER "inet_connection_sock" "icsk_accept_queue.rskq_defer_accept" required bytes;
            ICSK_FASTOPEN_MAX "inet_connection_sock" "icsk_accept_queue.fastopenq.max_qlen" required bytes;
            REQ_LISTENER "request_sock" "__req_common.skc_listener" required bytes;
            REQ_PPREV "request_sock" "__req_common.skc_nulls_node.pprev" required bytes;
            REQ_CHILD "request_sock" "sk" required bytes;
            REQ_NEXT "request_sock" "dl_next" required bytes;
            REQ_RETRANS "request_sock" "num_retrans" required bytes;
            REQ_TIMER "request_sock" "rsk_timer" required bytes;
            REQ_SYNACK_TIME "tcp_request_sock" "snt_synack" required bytes;
            TCP_ESTABLISHED_TIME "tcp_sock" "rcvq_space.time" required bytes;
            TCP_IS_MPTCP "tcp_sock" "is_mptcp" optional bytes;
            MPTCP_FIRST "mptcp_sock" "first" optional bytes;
            NET_INUM "net" "ns.inum" required bytes;
            NET_MIX "net" "hash_mix" required bytes;
            NET_SOMAXCONN "net" "core.sysctl_somaxconn" required bytes;
            NET_SYNCOOKIES "net" "ipv4.sysctl_tcp_syncookies" required bytes;
            NET_MAX_SYN_BACKLOG "net" "ipv4.sysctl_max_syn_backlog" required bytes;
            NET_MIGRATE_REQ "net" "ipv4.sysctl_tcp_migrate_req" optional bytes;
            NET_PORTS "net" "ipv4.ip_local_ports.range" required bytes;
            NET_PORTS_LOCK "net" "ipv4.ip_local_ports.lock" optional bytes;
            NET_UNPRIVILEGED "net" "ipv4.sysctl_ip_prot_sock" optional bytes;
            INET_SPORT "inet_sock" "inet_sport" required bytes;
            INET_PORTS "inet_sock" "local_port_range" optional bytes;
            UNIX_ADDR "unix_sock" "addr" optional bytes;
            UNIX_ADDR_LEN "unix_address" "len" optional bytes;
            UNIX_ADDR_NAME "unix_address" "name" optional bytes;
            NET_STATISTICS "net" "mib.net_statistics" required bytes;
            BPF_ARRAY_PPTRS "bpf_array" "pptrs" required bytes;
            SOCKET_SK "socket" "sk" required bytes;
            SOCKET_VFS_INODE "socket_alloc" "vfs_inode" required bytes;
            INODE_INO "inode" "i_ino" required bytes;
            TASK_TASKS "task_struct" "tasks" required bytes;
            TASK_TGID "task_struct" "tgid" required bytes;
            TASK_COMM "task_struct" "comm" required bytes;
            TASK_LEADER "task_struct" "group_leader" required bytes;
            TASK_FILES "task_struct" "files" required bytes;
            TASK_NSPROXY "task_struct" "nsproxy" required bytes;
            NSPROXY_NET "nsproxy" "net_ns" required bytes;
            FILES_FDT "files_struct" "fdt" required bytes;
            FDT_FD "fdtable" "fd" required bytes;
            FDT_MAX "fdtable" "max_fds" required bytes;
            FDT_OPEN "fdtable" "open_fds" required bytes;
            FILE_PRIVATE "file" "private_data" required bytes;
            FILE_INODE "file" "f_inode" required bytes;
            SKB_NEXT "sk_buff" "next" required bytes;
            SKB_SK "sk_buff" "sk" required bytes;
            SKB_CB "sk_buff" "cb" required bytes;
            TCP_CB_FLAGS "tcp_skb_cb" "tcp_flags" required bytes;
            TCP_CB_SEQ "tcp_skb_cb" "seq" required bytes;
            SKB_NETWORK "sk_buff" "network_header" required bytes;
            SKB_HEAD "sk_buff" "head" required bytes;
            SKB_TRANSPORT "sk_buff" "transport_header" required bytes;
            SKB_DEV "sk_buff" "dev" required bytes;
            SKB_PROTOCOL "sk_buff" "protocol" required bytes;
            SKB_DST "sk_buff" "_skb_refdst" required bytes;
            DST_DEV "dst_entry" "dev" required bytes;
            DEV_NET "net_device" "nd_net.net" required bytes;
        }
    };
}

/// Calls `$then! { GLOBAL "ENUMERATOR" after; ... }` with the kernel's counters
/// (`include/uapi/linux/snmp.h`): their offsets in `struct linux_mib` come from the kernel's BTF.
/// `n` says how many enumerators further on the name must stand than that of the line before: 0
/// begins a group that the programs read at once.
#[macro_export]
macro_rules! for_each_counter {
    ($then:ident) => {
        $then! {
            MIB_OVERFLOWS "LINUX_MIB_LISTENOVERFLOWS" 0;
            MIB_DROPS "LINUX_MIB_LISTENDROPS" 1;
            MIB_DO_COOKIES "LINUX_MIB_TCPREQQFULLDOCOOKIES" 0;
            MIB_FULL_DROP "LINUX_MIB_TCPREQQFULLDROP" 1;
            MIB_COOKIES_SENT "LINUX_MIB_SYNCOOKIESSENT" 0;
            MIB_COOKIES_RECV "LINUX_MIB_SYNCOOKIESRECV" 1;
            MIB_COOKIES_FAILED "LINUX_MIB_SYNCOOKIESFAILED" 1;
            MIB_EMBRYONIC_RSTS "LINUX_MIB_EMBRYONICRSTS" 1;
            MIB_DEFERRED "LINUX_MIB_TCPDEFERACCEPTDROP" 0;
            MIB_FASTOPEN_FULL "LINUX_MIB_TCPFASTOPENLISTENOVERFLOW" 0;
        }
    };
}
