// Generate compiles the contract and writes its Go stubs, with nothing but this module: the compiler is a library, the plugins are
// tools that go.mod pins. It runs in the module's folder, by `go generate ./...`.
package main

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"
)

const protos = "../../proto"

var (
	files   = []string{"dataqueue/v1/data_queue.proto", "dataqueue/v1/queue_admin.proto"}
	plugins = []string{"protoc-gen-go", "protoc-gen-go-grpc"}
)

func main() {
	log.SetFlags(0)
	if err := generate(); err != nil {
		log.Fatal(err)
	}
}

func generate() error {
	request, err := compile()
	if err != nil {
		return fmt.Errorf("compile %s: %w", protos, err)
	}
	for _, plugin := range plugins {
		if err := run(plugin, request); err != nil {
			return fmt.Errorf("%s: %w", plugin, err)
		}
	}
	// It belongs to all clients, and the package cannot embed what lies outside of its module.
	config, err := os.ReadFile("../service_config.json")
	if err != nil {
		return err
	}
	return os.WriteFile("v1/service_config.json", config, 0o644)
}

// compile answers what every plugin is asked.
func compile() ([]byte, error) {
	compiler := protocompile.Compiler{
		Resolver:       protocompile.WithStandardImports(&protocompile.SourceResolver{ImportPaths: []string{protos}}),
		SourceInfoMode: protocompile.SourceInfoStandard,
	}
	compiled, err := compiler.Compile(context.Background(), files...)
	if err != nil {
		return nil, err
	}
	request := &pluginpb.CodeGeneratorRequest{FileToGenerate: files, Parameter: proto.String("module=dataqueue")}
	known := map[string]bool{}
	for _, file := range compiled {
		request.ProtoFile = appendWithImports(request.ProtoFile, known, file)
	}
	return proto.Marshal(request)
}

// appendWithImports appends a file behind all that it imports, each once.
func appendWithImports(
	list []*descriptorpb.FileDescriptorProto, known map[string]bool, file protoreflect.FileDescriptor,
) []*descriptorpb.FileDescriptorProto {
	if known[file.Path()] {
		return list
	}
	known[file.Path()] = true
	for i := range file.Imports().Len() {
		list = appendWithImports(list, known, file.Imports().Get(i).FileDescriptor)
	}
	return append(list, protodesc.ToFileDescriptorProto(file))
}

// run has a plugin write its files.
func run(plugin string, request []byte) error {
	command := exec.Command("go", "tool", plugin)
	command.Stdin, command.Stderr = bytes.NewReader(request), os.Stderr
	output, err := command.Output()
	if err != nil {
		return err
	}
	var response pluginpb.CodeGeneratorResponse
	if err := proto.Unmarshal(output, &response); err != nil {
		return err
	}
	if response.Error != nil {
		return fmt.Errorf("it refuses: %s", response.GetError())
	}
	for _, file := range response.File {
		path := filepath.FromSlash(file.GetName())
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(file.GetContent()), 0o644); err != nil {
			return err
		}
	}
	return nil
}
