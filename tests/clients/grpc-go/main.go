// A gRPC client of carport's unix sockets that dials as the kubelet does, and as other Go programs do.
//
//	grpc-go call REGISTRATION_SOCKET CSI_SOCKET CARPORT_SOCKET
//	grpc-go record FILE
//
// `call` makes many calls on each connection, with metadata that fills HPACK's dynamic table and evicts from it.
// `record` writes what the client sends to a registration socket: a fixture of the tests.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/metadata"
	reflection "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
)

// More than fill the table of 4 KiB a hundred times.
const callsPerConnection = 500

const timeout = 10 * time.Second

const (
	getInfo = "/pluginregistration.Registration/GetInfo"
	notify  = "/pluginregistration.Registration/NotifyRegistrationStatus"
)

// The messages are small enough to be written by hand: no generated code.
type raw struct{}

func (raw) Name() string { return "proto" }

func (raw) Marshal(message any) ([]byte, error) {
	if bytes, ok := message.(*[]byte); ok {
		return *bytes, nil
	}
	return nil, fmt.Errorf("marshal %T", message)
}

func (raw) Unmarshal(data []byte, message any) error {
	if target, ok := message.(*[]byte); ok {
		*target = bytes.Clone(data)
		return nil
	}
	return fmt.Errorf("unmarshal %T", message)
}

var _ encoding.Codec = raw{}

// As pkg/kubelet/pluginmanager/operationexecutor dials a registration socket (Kubernetes 1.36).
func dialAsKubelet(socket string, dial func(context.Context, string) (net.Conn, error)) (*grpc.ClientConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return grpc.DialContext(ctx, socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithBlock(),
		grpc.WithContextDialer(dial))
}

func dialUnix(ctx context.Context, address string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "unix", address)
}

func withAuthority(authority string) func(string) (*grpc.ClientConn, error) {
	return func(socket string) (*grpc.ClientConn, error) {
		return grpc.NewClient("unix://"+socket,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithAuthority(authority))
	}
}

var ways = []struct {
	name string
	dial func(string) (*grpc.ClientConn, error)
}{
	{"kubelet", func(socket string) (*grpc.ClientConn, error) { return dialAsKubelet(socket, dialUnix) }},
	{"unix", func(socket string) (*grpc.ClientConn, error) {
		return grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	}},
	{"passthrough", func(socket string) (*grpc.ClientConn, error) {
		return grpc.NewClient("passthrough:///"+socket,
			grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(dialUnix))
	}},
	{"path as it is", withAuthority("/var/lib/kubelet/x.sock")},
	{"longer than the table", withAuthority("/" + strings.Repeat("long", 1500))},
}

// What is asked of a socket, and a text that the answer contains.
type call struct {
	method string
	// A call without one is made for the metadata alone.
	request []byte
	answer  string
}

var registration = []call{
	{getInfo, nil, "csi.carport.dev"},
	{notify, []byte{0x08, 0x01}, ""},
}

var csi = []call{
	{"/csi.v1.Identity/GetPluginInfo", nil, "csi.carport.dev"},
	{"/csi.v1.Identity/Probe", nil, ""},
	{"/csi.v1.Node/NodeGetInfo", nil, "node"},
}

var carport = []call{
	{"/carport.v1.LocalityService/GetNode", nil, "node"},
	{"/carport.v1.GpuService/GetGpuInventory", nil, ""},
	{"/grpc.health.v1.Health/Check", nil, ""},
}

// Some names repeat and some do not, some values too, some are larger than the whole table.
func varied(random *rand.Rand) metadata.MD {
	pairs := metadata.MD{}
	for range random.Intn(8) {
		name := fmt.Sprintf("x-%d", random.Intn(40))
		length := random.Intn(20)
		if random.Intn(4) == 0 {
			length = random.Intn(900)
		}
		value := strings.Repeat(string(rune('!'+random.Intn(90))), length)
		if random.Intn(2) == 0 {
			value += fmt.Sprint(random.Intn(1000))
		}
		pairs.Append(name, value)
	}
	if random.Intn(50) == 0 {
		pairs.Append("x-large", strings.Repeat("~", 5000))
	}
	return pairs
}

func invoke(connection *grpc.ClientConn, ctx context.Context, what call) error {
	answer := []byte{}
	request := what.request
	if err := connection.Invoke(ctx, what.method, &request, &answer, grpc.ForceCodec(raw{})); err != nil {
		return fmt.Errorf("%s: %w", what.method, err)
	}
	if !strings.Contains(string(answer), what.answer) {
		return fmt.Errorf("%s: %q has no %q", what.method, answer, what.answer)
	}
	return nil
}

func callAll(connection *grpc.ClientConn, calls []call, random *rand.Rand) error {
	for number := range callsPerConnection {
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		ctx = metadata.NewOutgoingContext(ctx, varied(random))
		what := calls[random.Intn(len(calls))]
		if number < len(calls) {
			what = calls[number]
		}
		err := invoke(connection, ctx, what)
		cancel()
		if err != nil {
			return fmt.Errorf("call %d: %w", number, err)
		}
		// A method that does not exist is answered as such, and harms no other call.
		if number%100 == 99 {
			err := invoke(connection, context.Background(), call{method: "/no.Such/Method"})
			if status.Code(errors.Unwrap(err)) != codes.Unimplemented {
				return fmt.Errorf("an unknown method: %w", err)
			}
		}
	}
	return nil
}

func listServices(connection *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	stream, err := reflection.NewServerReflectionClient(connection).ServerReflectionInfo(ctx)
	if err != nil {
		return fmt.Errorf("reflection: %w", err)
	}
	request := &reflection.ServerReflectionRequest{
		MessageRequest: &reflection.ServerReflectionRequest_ListServices{},
	}
	if err := stream.Send(request); err != nil {
		return fmt.Errorf("reflection: %w", err)
	}
	answer, err := stream.Recv()
	if err != nil {
		return fmt.Errorf("reflection: %w", err)
	}
	names := []string{}
	for _, service := range answer.GetListServicesResponse().GetService() {
		names = append(names, service.GetName())
	}
	if list := strings.Join(names, " "); !strings.Contains(list, "carport.v1.LocalityService") {
		return fmt.Errorf("reflection lists %q", list)
	}
	return stream.CloseSend()
}

func callSockets(sockets []string) error {
	kinds := []struct {
		name  string
		calls []call
	}{{"registration", registration}, {"csi", csi}, {"carport", carport}}
	for at, kind := range kinds {
		for _, way := range ways {
			connection, err := way.dial(sockets[at])
			if err != nil {
				return fmt.Errorf("%s, %s: dial: %w", kind.name, way.name, err)
			}
			err = callAll(connection, kind.calls, rand.New(rand.NewSource(int64(at))))
			if err == nil && kind.name == "carport" {
				err = listServices(connection)
			}
			connection.Close()
			if err != nil {
				return fmt.Errorf("%s, %s: %w", kind.name, way.name, err)
			}
			fmt.Printf("%s, %s: %d calls\n", kind.name, way.name, callsPerConnection)
		}
	}
	return nil
}

// A server that keeps what it reads, and answers each call with UNIMPLEMENTED.
func keep(stream net.Conn) []byte {
	var sent bytes.Buffer
	reader := io.TeeReader(stream, &sent)
	framer := http2.NewFramer(stream, reader)
	if _, err := io.CopyN(io.Discard, reader, int64(len(http2.ClientPreface))); err != nil {
		return sent.Bytes()
	}
	framer.WriteSettings()
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			return sent.Bytes()
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				framer.WriteSettingsAck()
			}
		case *http2.DataFrame:
			if frame.StreamEnded() {
				framer.WriteHeaders(http2.HeadersFrameParam{
					StreamID: frame.StreamID,
					// :status 200, and the others as they are.
					BlockFragment: []byte("\x88\x00\x0ccontent-type\x10application/grpc\x00\x0bgrpc-status\x0212"),
					EndStream:     true,
					EndHeaders:    true,
				})
			}
		}
	}
}

func record(file string) error {
	const socket = "/var/lib/kubelet/plugins_registry/csi.carport.dev-reg.sock"
	server, client := net.Pipe()
	sent := make(chan []byte)
	go func() { sent <- keep(server) }()
	connection, err := dialAsKubelet(socket, func(context.Context, string) (net.Conn, error) { return client, nil })
	if err != nil {
		return err
	}
	// GetInfo twice: the second time, the fields come from the dynamic table.
	for _, what := range []call{registration[0], registration[0], registration[1]} {
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		err := invoke(connection, ctx, what)
		cancel()
		if status.Code(errors.Unwrap(err)) != codes.Unimplemented {
			return err
		}
	}
	connection.Close()
	return os.WriteFile(file, <-sent, 0o644)
}

func run(arguments []string) error {
	switch {
	case len(arguments) == 4 && arguments[0] == "call":
		return callSockets(arguments[1:])
	case len(arguments) == 2 && arguments[0] == "record":
		return record(arguments[1])
	default:
		return errors.New("usage: grpc-go call REGISTRATION_SOCKET CSI_SOCKET CARPORT_SOCKET | grpc-go record FILE")
	}
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
