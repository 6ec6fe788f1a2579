"""The vhost-user protocol, both ends. Who looks for something finds it here:

message     what each request looks like on the wire        session     what it means: the back end's side
vring       what was said of one queue                      memory      the regions of guest memory
dirty       which writes are logged, and where              inflight    what survives a crash of the back end
transfer    a device's state on its way                     share       a file's range that came from the front end
edge        what all of these ask of their owner; they do no I/O themselves

server      sockets, descriptors, one front end at a time   channel     the socket on which the back end asks
transport   streams with descriptors, mapped files          state_file  a state through somebody's pipe, in its own time
frontend    the other side: drives any back end
"""
